"""SHA-256 of the files of nanochat's bundle: 18 of its 21 data files, the list of tasks, the baselines."""

OFFICIAL = {
    "eval_data/commonsense_reasoning/commonsense_qa.jsonl": (
        "2771f63f8127c0725b1f6b0ef2cd2ef6469168ae5875fc8d276b25b4f32c8c1a"
    ),
    "eval_data/commonsense_reasoning/copa.jsonl": "595dca44dec54c849490bd403a3e24a29e3b944065783222ebb0eb1a55298846",
    "eval_data/commonsense_reasoning/openbook_qa.jsonl": (
        "adb2e5c7f8db810ddad4d6b2bf53dcc86dcc545499f7aafcaf42a8e179476c09"
    ),
    "eval_data/commonsense_reasoning/piqa.jsonl": "d2870e73aec5154df3faf259b7700876e11608eebdf69e9d6667435673dbe4e0",
    "eval_data/language_understanding/bigbench_language_identification.jsonl": (
        "80c98d8e7ab8213513d1643886229c05c40a6837353b07c19ac7bd860668954e"
    ),
    "eval_data/language_understanding/lambada_openai.jsonl": (
        "411bfbe5b9054346b6a19299c0242670adbefb9162efd958593cbc0290b8c9dc"
    ),
    "eval_data/language_understanding/winograd_wsc.jsonl": (
        "746336c27cd2e39a554cb1b8b4869d0f1ae2577ac5bfe799842d26bca5a5bf5e"
    ),
    "eval_data/language_understanding/winogrande.jsonl": (
        "ea1592526f3bfdd0948ed3acb1b4dfa3f83d23698917118688ee1df7f8d4b8d7"
    ),
    "eval_data/reading_comprehension/boolq.jsonl": ("454ff101e614370bb1807fe7ebbda6fdb57e794b9662cc1ccae211bf1ff626c8"),
    "eval_data/symbolic_problem_solving/agi_eval_lsat_ar.jsonl": (
        "9ffd73480b51746c11627e56239f8b87035eb255cb92c3a58fd64e2e4b65fb56"
    ),
    "eval_data/symbolic_problem_solving/bigbench_cs_algorithms.jsonl": (
        "8485683a8c7e7e6c9fc6ca3cc81140fd85edb27f34406a6736d1539cf7ebcb3a"
    ),
    "eval_data/symbolic_problem_solving/bigbench_dyck_languages.jsonl": (
        "106ba9ac7507c7ab385c5e59c49cd57aa83025abf080d9b2a2661c0d6c6dbcc5"
    ),
    "eval_data/symbolic_problem_solving/bigbench_operators.jsonl": (
        "41e2964ad619c49edd97c22b2c50f922a0241255d906a754bf81a20f4f66b85f"
    ),
    "eval_data/symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl": (
        "8febd2c0080a15680cd17f92bfa30d87abcfac021e646e55d0b8ad69f0cfa767"
    ),
    "eval_data/world_knowledge/arc_challenge.jsonl": (
        "1ae3aeedf1951d881cbd5c2e3a31e78a1993d251479afbe4cb413b6707244636"
    ),
    "eval_data/world_knowledge/arc_easy.jsonl": "d2d12e59543acf9a5ef6079634a72b30215e36c2fd4236fff3bc855d287b87f5",
    "eval_data/world_knowledge/bigbench_qa_wikidata.jsonl": (
        "bb0d22727cb25beffb022c8e8c0c3e1159c8b3c7bd7284603c0d6491f8616265"
    ),
    "eval_data/world_knowledge/jeopardy_all.jsonl": (
        "187e7f270a440c63d6cf11a57459fdc7e0bce889338225e42cc88e24ee13d52e"
    ),
    "core.yaml": "463f6ae0aa127fbd41fa655f8919e136858f4849eef176922a3be96e102ce7e7",
    "eval_meta_data.csv": "84e279cdc0d836c9ea3a6e55a99102f8ee18f72809fe7aa6ac5a1fe630aa492f",
}
