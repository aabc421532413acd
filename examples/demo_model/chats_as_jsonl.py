"""The chats of a token row as JSON lines with ``messages``, as ``eagleray train-draft --data`` reads them."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from data import SEPARATOR_ID
from tokenizers import Tokenizer

TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


def chats(row: np.ndarray, tokenizer: Tokenizer) -> Iterator[list[dict[str, str]]]:
    """The messages of each chat."""
    for chat in np.split(row, np.flatnonzero(row == SEPARATOR_ID) + 1):
        text = tokenizer.decode(chat.tolist(), skip_special_tokens=False)
        messages = [{"role": role, "content": content} for role, content in TURN.findall(text)]
        if messages and messages[-1]["role"] == "assistant":
            yield messages


def _question(messages: list[dict[str, str]]) -> str:
    """All that is asked before the last answer."""
    return json.dumps(messages[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", type=Path, help="train_chats.npy or held_out_chats.npy of the work folder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path("../../models/demo/tokenizer.json"))
    parser.add_argument("--seed", type=int, default=0, help="of their order")
    parser.add_argument(
        "--without", type=Path, help="JSON lines of this program: leave out chats that ask what these ask"
    )
    arguments = parser.parse_args()
    found = list(chats(np.load(arguments.row), Tokenizer.from_file(str(arguments.tokenizer))))
    random.Random(arguments.seed).shuffle(found)
    if arguments.without is not None:
        asked = {_question(json.loads(line)["messages"]) for line in arguments.without.open(encoding="utf-8")}
        found = [messages for messages in found if _question(messages) not in asked]
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in found]
    arguments.output.write_text("".join(lines), encoding="utf-8")
    print(f"{len(found)} chats in {arguments.output}")


if __name__ == "__main__":
    main()
