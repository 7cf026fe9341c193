"""Small tasks for lm-eval."""

QUESTIONS = [
    {
        "question": f"What does token {i} read?",
        "choices": ["the state of the token before", "nothing", f"token {i}"],
        "gold": 0,
    }
    for i in range(5)
]
TASK = """
task: memory
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
LONG_ANSWER = """
task: long
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "nothing"
generation_kwargs: {{until: ["zzz"], max_gen_toks: 300}}
metric_list: [{{metric: exact_match}}]
"""
