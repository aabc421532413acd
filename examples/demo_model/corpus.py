"""The demo model's corpus: the Python standard library, as text and as chats.

The files of the running interpreter's standard library are the only large
source.  Each is used twice: whole, so that the model learns to write Python,
and function by function, as a question and an answer in the chat format, so
that it learns to answer.  A few hand-written chats (``small_talk.py``) teach it to
say hello, and some small functions (``exercises.py``) what people ask for first.

Held-out data is chosen by file: the chats made from a held-out file are held out
with it, since they repeat its text.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from chats import chats_of, exercise_chats
from small_talk import SMALL_TALK, SYSTEM_MESSAGES, Dialogue
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
VOCABULARY_SIZE = 4096
HELD_OUT_PERCENT = 3
SMALL_TALK_REPEATS = 24
EXERCISE_REPEATS = 6
SYSTEM_SHARE = 0.15
SEED = 2024


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the standard library."""

    relative_path: str
    text: str

    @property
    def module(self) -> str:
        """The dotted name under which the file is imported."""
        parts = list(Path(self.relative_path).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def is_held_out(self) -> bool:
        """Whether the file is kept out of training, decided by its path alone."""
        digest = hashlib.sha256(self.relative_path.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def standard_library() -> Iterator[SourceFile]:
    """Every readable ``.py`` file of the running interpreter, in path order."""
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # the tests hold files that are broken on purpose
        yield SourceFile(relative.as_posix(), text)


def render(dialogue: Dialogue, system: str = "") -> str:
    """A chat as text, in the format of the chat template."""
    prefix = f"{START_OF_TURN}system\n{system}{END_OF_TURN}\n" if system else ""
    return prefix + "".join(
        f"{START_OF_TURN}user\n{question}{END_OF_TURN}\n{START_OF_TURN}assistant\n{answer}{END_OF_TURN}\n"
        for question, answer in dialogue
    )


def render_all(chats: Iterable[Dialogue], seed: str) -> list[str]:
    """The chats as text, some of them under a system message, which changes nothing."""
    draw = random.Random(seed)
    return [render(chat, draw.choice(SYSTEM_MESSAGES) if draw.random() < SYSTEM_SHARE else "") for chat in chats]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level byte-pair tokenizer with the three special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents in one row of token ids, each followed by the separator."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    rows = [
        np.array([*encoding.ids, separator], dtype=np.uint16)
        for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)
    ]
    return np.concatenate(rows)


def build(folder: Path, tokenizer_path: Path) -> dict[str, int]:
    """Write the four token files, and the tokenizer where there is none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    files = list(standard_library())
    chats = {file.relative_path: render_all(chats_of(file.text, file.module), file.relative_path) for file in files}
    exercises = Path(__file__).with_name("exercises.py").read_text("utf-8")
    hand_written = render_all(SMALL_TALK * SMALL_TALK_REPEATS, "small talk")
    hand_written += render_all(exercise_chats(exercises) * EXERCISE_REPEATS, "exercises")
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        tokenizer = train_tokenizer([f.text for f in files if not f.is_held_out] + hand_written)
        tokenizer.save(str(tokenizer_path))
    sizes: dict[str, int] = {}
    for split, held_out in (("train", False), ("held_out", True)):
        chosen = [file for file in files if file.is_held_out is held_out]
        documents = {
            "files": [file.text for file in chosen],
            "chats": [chat for file in chosen for chat in chats[file.relative_path]],
        }
        if not held_out:
            documents["chats"] += hand_written
            documents["files"] += [exercises] * EXERCISE_REPEATS
        for kind, texts in documents.items():
            random.Random(SEED).shuffle(texts)
            tokens = _encode(tokenizer, texts)
            np.save(folder / f"{split}_{kind}.npy", tokens)
            sizes[f"{split}_{kind}_tokens"] = len(tokens)
            sizes[f"{split}_{kind}_bytes"] = sum(len(text.encode()) for text in texts)
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-folder", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="made where it is missing")
    arguments = parser.parse_args()
    print(json.dumps(build(arguments.work_folder, arguments.tokenizer), indent=2))


if __name__ == "__main__":
    main()
