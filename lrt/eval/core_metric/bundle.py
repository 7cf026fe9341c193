"""The bundle of CORE's tasks: a folder of questions, downloaded or given, held against its checksums.

    core.yaml                  the tasks: label, file, few-shot examples, type, delimiter
    eval_meta_data.csv         their random baselines
    eval_data/**/*.jsonl       their questions
    SHA256SUMS                 optional: checksums of these files
    openai-community-*.csv, extra/…    optional: results of other models, shown beside

A task whose file is not there is left out: the score is then a partial CORE.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lrt.utils.files import replace_folder, sha256, temporary_name
from lrt.utils.progress import bar

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""nanochat's bundle."""
TASKS = 22
"""As many make a CORE."""
TYPES = ("multiple_choice", "schema", "language_modeling")
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}
"""Where a type's options are; gold counts them from 0."""
SUMS = "SHA256SUMS"
CHUNK = 1 << 20
"""Bytes downloaded at a time."""
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
"""File -> SHA-256, of nanochat's bundle."""
OFFICIAL_OF = {OFFICIAL["core.yaml"]: OFFICIAL}
"""core.yaml's SHA-256 -> the sums of its bundle: what a folder without SHA256SUMS is held against."""


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle."""

    label: str
    file: Path
    """JSON lines: one question each."""
    type: str
    """multiple_choice, schema or language_modeling."""
    shots: int
    """Examples before each question."""
    delimiter: str
    """Between question and answer."""
    random: float
    """Accuracy of guessing, 0 to 1."""
    sha256: str | None
    """What the file's checksum must be; None where it is not known."""

    def centred(self, accuracy: float) -> float:
        """(accuracy - random) / (1 - random): 0 is guessing, 1 perfect."""
        return (accuracy - self.random) / (1 - self.random)

    def questions(self) -> list[dict[str, Any]]:
        """The task's questions. ValueError, naming the file and the fix, where it is damaged."""
        fix = "copy or download the bundle again"
        items = []
        # Not splitlines(), which also breaks at U+2028 and the like, inside of a text.
        lines = self.file.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
        for number, line in enumerate(lines, 1):
            try:
                items.append(json.loads(line))
                missing = [field for field in FIELDS[self.type] if field not in items[-1]]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.file}, line {number} is cut off or damaged ({error}); {fix}") from error
            if missing:
                raise ValueError(f"{self.file}, line {number} has no {', '.join(missing)}; {fix}")
            if self.type in OPTIONS:
                options, gold = items[-1][OPTIONS[self.type]], items[-1]["gold"]
                if not isinstance(options, list) or not isinstance(gold, int) or (not 0 <= gold < len(options)):
                    raise ValueError(
                        f"{self.file}, line {number}: gold is {gold!r}, none of its {OPTIONS[self.type]}; {fix}"
                    )
        if len(items) <= self.shots:
            raise ValueError(f"{self.file} has {len(items)} questions, too few for {self.shots} shots; {fix}")
        actual = sha256(self.file)
        if self.sha256 not in (None, actual):
            raise ValueError(
                f"{self.file} is not the bundle's file: its SHA-256 is {actual} instead of {self.sha256}; {fix}"
            )
        return items


@dataclass(frozen=True)
class Bundle:
    """The tasks of a folder."""

    folder: Path
    tasks: tuple[CoreTask, ...]
    """Those whose file is there, in the bundle's order."""
    missing: tuple[str, ...]
    """Labels of those whose file is not."""
    references: dict[str, dict[str, float]]
    """Other models' centred accuracy by task, and `CORE`."""

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Open a bundle's folder, or one that holds it. ValueError naming what is missing or damaged."""
        inner = [f for f in (folder, folder / "core_eval", folder / "eval_bundle") if (f / "core.yaml").is_file()]
        if len(inner) == 0:
            raise ValueError(
                f"there is no CORE bundle in {folder}: {folder / 'core.yaml'} is missing; give the folder that holds "
                "it, or call `--core` without a folder to download it"
            )
        folder = inner[0]
        sums = read_sums(folder / SUMS) or OFFICIAL_OF.get(sha256(folder / "core.yaml"), {})
        for name in ("core.yaml", "eval_meta_data.csv"):
            file = folder / name
            if not file.is_file():
                raise ValueError(f"{file} is missing; copy or download the bundle again")
            if sums.get(name) not in (None, sha256(file)):
                raise ValueError(
                    f"{file} is not the bundle's file: its SHA-256 differs; copy or download the bundle again"
                )
        tasks = read_tasks(folder, sums)
        present = tuple(task for task in tasks if task.file.is_file())
        if len(present) == 0:
            raise ValueError(f"{folder / 'eval_data'} holds no task's file; copy or download the bundle again")
        missing = tuple(task.label for task in tasks if not task.file.is_file())
        return cls(folder, present, missing, read_references(folder))


def read_tasks(folder: Path, sums: Mapping[str, str]) -> list[CoreTask]:
    """All tasks that core.yaml names, their files there or not. ValueError where it is damaged."""
    random = read_baselines(folder / "eval_meta_data.csv")
    try:
        described = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        tasks = []
        for entry in described:
            if entry["icl_task_type"] not in TYPES:
                raise ValueError(f"its type {entry['icl_task_type']!r} is none of {', '.join(TYPES)}")
            name = f"eval_data/{entry['dataset_uri']}"
            tasks.append(
                CoreTask(
                    entry["label"],
                    folder / name,
                    entry["icl_task_type"],
                    entry["num_fewshot"][0],
                    entry.get("continuation_delimiter", " "),
                    random[entry["label"]],
                    sums.get(name),
                )
            )
    except (yaml.YAMLError, KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{folder / 'core.yaml'} is damaged, or eval_meta_data.csv beside it lacks one of its tasks ({error!r}); "
            "copy or download the bundle again"
        ) from error
    return tasks


def read_baselines(file: Path) -> dict[str, float]:
    """Task -> accuracy of guessing, 0 to 1."""
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(lines)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); copy or download the bundle again") from error


def read_sums(file: Path) -> dict[str, str]:
    """File name -> SHA-256, as `sha256sum` writes them; nothing where there is no such file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {name.strip().removeprefix("./"): digest for digest, _, name in (line.partition("  ") for line in lines)}


def read_references(folder: Path) -> dict[str, dict[str, float]]:
    """Results of other models: CSV files of task, accuracy, centred accuracy."""
    references: dict[str, dict[str, float]] = {}
    for file in sorted([*folder.glob("openai-community-*.csv"), *folder.glob("extra/openai-community-*.csv")]):
        with file.open(encoding="utf-8", newline="") as lines:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
        references[file.stem.removeprefix("openai-community-")] = {
            row[0]: float(row[2]) for row in rows[1:] if len(row) > 2
        }
    return references


def download(folder: Path, url: str = URL, sums: Mapping[str, str] = OFFICIAL, progress: bool = True) -> Path:
    """Download a bundle's .zip into `folder`, unless it is there; returns the folder.

    Every file of `sums` has to have its checksum; those of all files are then noted in SHA256SUMS. Nothing is left
    behind by a download that fails. ValueError for a file that differs, OSError where the network fails.
    """
    if (folder / SUMS).is_file():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds files that were not downloaded (it has no {SUMS}); score with them: --core {folder}, or "
            "move them away"
        )
    fresh = temporary_name(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        archive = fresh / "bundle.zip"
        fetch(url, archive, progress)
        unpack(archive, fresh, url)
        archive.unlink()
        names = sorted(str(file.relative_to(fresh)) for file in fresh.rglob("*") if file.is_file())
        actual = {name: sha256(fresh / name) for name in names}
        for name, digest in sums.items():
            if actual.get(name) != digest:
                raise ValueError(
                    f"{name} of {url} has the SHA-256 {actual.get(name)} instead of {digest}: damaged, or another "
                    "bundle; download it again, or give a folder: --core FOLDER"
                )
        (fresh / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in actual.items()), encoding="utf-8")
        replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def fetch(url: str, file: Path, progress: bool) -> None:
    """Download one file. OSError where it cannot be had, or ends early."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, file.open("wb") as out:
            size = int(answer.headers.get("Content-Length") or 0)
            with bar(f"downloading {url.rsplit('/', 1)[-1]}", size or None, progress) as advance:
                while part := answer.read(CHUNK):
                    out.write(part)
                    advance(len(part))
    except (OSError, ValueError) as error:
        raise OSError(f"cannot download {url}: {error}; try again, or give a folder: --core FOLDER") from error
    received = file.stat().st_size
    if received < size:
        raise OSError(f"{url} ended after {received:,} of {size:,} bytes; try again, or give a folder: --core FOLDER")


def unpack(archive: Path, folder: Path, url: str) -> None:
    """Take the bundle's files out of a .zip: those, and no others. ValueError where it is no whole .zip."""
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                short = name.split("/", 1)[-1] if name.split("/")[0] in ("eval_bundle", "core_eval") else name
                parts = Path(short).parts
                known = short in ("core.yaml", "eval_meta_data.csv") or short.startswith("openai-community-")
                # A path with `..` would lead out of the folder.
                if ".." in parts or name.endswith("/") or not (known or parts[:1] == ("eval_data",)):
                    continue
                target = folder / short
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(packed.read(name))
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{url} is no whole .zip ({error}); download it again, or give a folder") from error


def bundle_digest(bundle: Bundle) -> str:
    """One hash for what decides the questions: core.yaml and the baselines. Files are hashed when they are read."""
    text = b"".join((bundle.folder / name).read_bytes() for name in ("core.yaml", "eval_meta_data.csv"))
    return hashlib.sha256(text).hexdigest()
