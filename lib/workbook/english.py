"""The parts of a staged pipeline in English, for a model that was taught to follow instructions."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

from workbook import answers, stages
from workbook.models import lm, twospeed

WORD_PROBLEMS = [
    ("Tom has 7 bags with 6 apples each. He eats 5 apples. How many apples are left?", "37"),
    ("A train has 8 cars with 24 seats each. 50 seats are taken. How many seats are free?", "142"),
    ("Ann buys 3 books for 12 dollars each and pays with a 50 dollar note. How much does she get back?", "14"),
    ("A baker makes 9 trays of 12 rolls and sells 70 rolls. How many rolls are left?", "38"),
]


def roles() -> SimpleNamespace:
    """Prompts and readers of replies for a model that was taught to follow instructions; an outline is JSON."""

    def parse(reply):
        try:
            found = json.loads(reply[reply.find("{") : reply.rfind("}") + 1])
        except ValueError:
            return None
        steps = list(found.items()) if isinstance(found, dict) else []
        good = steps and all(key == f"step{i}" and isinstance(text, str) for i, (key, text) in enumerate(steps, 1))
        return [text for _, text in steps] if good else None

    def number(reply, pattern=r"-?\d+(?:\.\d+)?"):
        found = re.findall(pattern, reply)
        return found[-1] if found else None

    def so_far(steps, results):
        return "".join(f"\n{step} {result}" for step, result in zip(steps, results or [""] * len(steps), strict=False))

    plan = 'Split this problem into short steps. Reply with JSON only: {{"step1": "...", "step2": "..."}}\nProblem: {}'
    rank = "How hard is this step, from 0 (a child sees it) to 1 (long thought)? One number only.\n{}{}\nStep: {}"
    ways = "Reply with the result only.", "Think step by step, then give the result."
    return SimpleNamespace(
        MOST={"plan": 90, "choose": 6, "judge": 8, "solve": 48}, parse=parse, result=number, plan=plan.format,
        choose=lambda p, versions: f"{p}\nWhich version splits this best? Reply with its number.\n{versions}",
        version=lambda reply: int(number(reply, r"\d+") or 1) - 1,
        judge=lambda p, before, step, results=None: rank.format(p, so_far(before, results), step),
        score=lambda reply: twospeed.score(number(reply) or ""),
        solve=lambda p, before, step, results, hard: f"{p}{so_far(before, results)}\n{step}\n{ways[hard]}",
    )  # fmt: skip


def speaker(device: str = "cpu", **options) -> stages.Speaker:
    """SmolLM2-135M-Instruct behind its chat template; options: of `stages.Speaker`."""
    tokenizer = lm.load_tokenizer()
    model, end = answers.load_model(device=device), tokenizer.eos_token_id
    return stages.Speaker(
        model, encode=lambda text: lm.chat(tokenizer, text)[0].tolist(), stop=end,
        decode=lambda ids: tokenizer.decode(ids[ids >= 0]), **options,
    )  # fmt: skip
