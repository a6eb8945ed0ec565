"""The method of test-time/scale against enumeration and scripted models; its world, its rivals, its bookkeeping."""

import sys
from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from test_mutations import checks, fails, mutate
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from workbook import answers, english, stages
from workbook.models import twospeed
from workbook.models.lm import Llama
from workbook.notebook import load_method
from workbook.stages import Said, Scripted, Trace

NAME = "test-time/scale"
scale = load_method(NAME)
TOY = twospeed.Problem(37, (("*", 24), ("+", 5), ("*", 9)))
STEPS = [("*", 3), ("*", 8), ("+", 5), ("*", 9)]
SAYS = {"*": "0.7", "+": "0.3"}


def rng(seed=0):
    return np.random.default_rng(seed)


class Told:
    """Replies from a function of (prompt, run, draw), and a list of everything that was asked."""

    def __init__(self, reply, tokens=None, ended=True):
        self.reply, self.asked, self.tokens, self.ended = reply, [], tokens, ended

    def __call__(self, prompts, runs, *, most, draw=0, draws=1, stop=None):
        self.asked += prompts
        texts = [self.reply(prompt, run, draw) for prompt, run in zip(prompts, runs, strict=True)]
        return [
            Said(text, self.tokens or len(text) + 1, self.ended, len(p)) for text, p in zip(texts, prompts, strict=True)
        ]


def ready(count=1, **fields):
    """Traces of the toy problem with an outline of four steps."""
    return [Trace(TOY, run, steps=list(STEPS), **fields) for run in range(count)]


def perfect(prompt, run=0, draw=0):
    """A solver that is always right: the result of the prompt's last step."""
    *before, last = prompt.partition("|")[2].split(";")
    sign, digit = last.strip("=<")[-2:]
    value = int(before[-1][-3:] if before else last[:3])
    pad = twospeed.scratchpad(value, (sign, int(digit))) + ">" if prompt[-1] == "<" else ""
    return f"{pad}{twospeed.apply(value, (sign, int(digit))):03}"


# -- stage 1 -----------------------------------------------------------------------------------------------------------


def test_outlines_that_are_none_are_drawn_again():
    replies = ["*3*8+5", "nonsense", "*4*6+5", "+", "*6*4+5"]
    ask = Told(lambda prompt, run, draw: replies[draw])
    [trace] = traces = [Trace(TOY, 0)]
    scale.decompose(ask, twospeed, traces, 3)
    assert [twospeed.written(v) for v in trace.versions] == ["*3*8+5", "*4*6+5", "*6*4+5"]
    assert (trace.drawn, trace.spent["calls"]) == (5, 5)
    assert trace.spent["plan"] == sum(len(reply) + 1 for reply in replies)
    assert ask.asked == ["D037*24+5*9|"] * 5


def test_drawing_ends_after_so_many_rounds():
    [trace] = traces = [Trace(TOY, 0)]
    scale.decompose(Told(lambda *_: "no"), twospeed, traces, 4, rounds=2)
    assert (trace.versions, trace.drawn) == ([], 8)


def test_an_outline_that_was_cut_is_none():
    traces = [Trace(TOY, 0)]
    scale.decompose(Told(lambda *_: "*3*8", ended=False), twospeed, traces, 2, rounds=1)
    assert traces[0].versions == []


def test_the_named_version_is_taken():
    traces = [Trace(TOY, run, versions=[[("*", 2)], [("*", 3)], [("*", 4)]]) for run in range(3)]
    ask = Told(lambda prompt, run, draw: "bca"[run])
    scale.select(ask, twospeed, traces)
    assert [t.steps for t in traces] == [[("*", 3)], [("*", 4)], [("*", 2)]]
    assert ask.asked[0] == "Q037*24+5*9|a*2;b*3;c*4;|"
    assert all(t.spent == {"plan": 2, "read": len(ask.asked[0]), "calls": 1} for t in traces)


@pytest.mark.parametrize(("replies", "taken", "calls"), [("?cb", 1, 3), ("???", 0, 3), ("hb?", 1, 2)])
def test_a_name_of_no_version_is_asked_again(replies, taken, calls):
    [trace] = traces = [Trace(TOY, 0, versions=[[("*", 2)], [("*", 3)]])]
    scale.select(Told(lambda prompt, run, draw: replies[draw]), twospeed, traces)
    assert trace.steps == trace.versions[taken]
    assert trace.spent["calls"] == calls


def test_a_single_version_needs_no_choice():
    traces = [Trace(TOY, 0, versions=[[("*", 2)]]), Trace(TOY, 0)]
    ask = Told(lambda *_: "b")
    scale.select(ask, twospeed, traces)
    assert ([t.steps for t in traces], ask.asked) == ([[("*", 2)], []], [])


# -- stages 2 and 3 ----------------------------------------------------------------------------------------------------


def test_the_judge_sees_earlier_steps_but_no_results():
    traces, ask = ready(scores=[0.1, 0.2], results=[111, 888]), Told(lambda *_: "0.4")
    scale.assess(ask, twospeed, traces, 2)
    assert ask.asked == ["A037*24+5*9|037*3;*8;+5|"]
    assert traces[0].scores == [0.1, 0.2, 0.4]


def test_the_judge_sees_results_if_told_to():
    traces, ask = ready(scores=[0.1, 0.2], results=[111, 888]), Told(lambda *_: "0.4")
    scale.assess(ask, twospeed, traces, 2, seen=True)
    assert ask.asked == ["A037*24+5*9|037*3=111;*8=888;+5|"]


def test_a_score_is_asked_for_until_it_is_a_number_from_0_to_1():
    replies = {0: ["0.2"], 1: ["x", "1.5", "0.6"], 2: ["", "-1", "nan"]}
    traces = ready(3)
    scale.assess(Told(lambda prompt, run, draw: replies[run][draw]), twospeed, traces, 0)
    assert [t.scores for t in traces] == [[0.2], [0.6], [1.0]]  # no number: it counts as hard
    assert [t.spent["calls"] for t in traces] == [1, 3, 3]


def test_the_last_score_is_asked_for_and_overwritten():
    traces = ready(scores=[0.1, 0.1, 0.1])
    scale.assess(Told(lambda *_: "0.2"), twospeed, traces, 3)
    assert (traces[0].scores[-1], traces[0].spent["judge"]) == (0.9, 4)
    for last, expected in ((None, 0.2), (0.5, 0.5)):
        traces = ready(scores=[0.1, 0.1, 0.1])
        scale.assess(Told(lambda *_: "0.2"), twospeed, traces, 3, last=last)
        assert traces[0].scores[-1] == expected


def test_a_score_equal_to_the_threshold_is_easy():
    traces = [Trace(TOY, 0, scores=[score]) for score in (0.49, 0.5, 0.51)]
    assert scale.threshold(0.5)(traces, 0) == [False, False, True]


# -- stage 4 -----------------------------------------------------------------------------------------------------------


def test_results_enter_the_context_and_thinking_does_not():
    traces, ask = ready(), Told(perfect)
    scale.execute(ask, twospeed, traces, lambda traces, place: [place % 2 == 1] * len(traces))
    start = "R037*24+5*9|037*3"
    assert ask.asked == [f"{start}=", f"{start}=111;*8<", f"{start}=111;*8=888;+5=", f"{start}=111;*8=888;+5=893;*9<"]
    assert traces[0].results == [111, 888, 893, 37]
    assert traces[0].hard == [False, True, False, True]
    assert traces[0].answer == TOY.answer
    assert traces[0].spent["solve"] == 4 + 20 + 4 + 20


def test_a_failed_step_ends_its_trace_and_no_other():
    ask = Told(lambda prompt, run, draw: "no" if run == 1 and "+5=" in prompt else perfect(prompt))
    traces = ready(3)
    scale.execute(ask, twospeed, traces, stages.never)
    assert [t.answer for t in traces] == [TOY.answer, None, TOY.answer]
    assert [len(t.results) for t in traces] == [4, 2, 4]
    assert [t.spent["calls"] for t in traces] == [4, 3, 4]


@pytest.mark.parametrize(("limit", "solved", "spent"), [(20, 4, 80), (19, 0, 19), (8, 0, 8)])
def test_a_long_thought_is_cut_and_has_no_result(limit, solved, spent):
    traces = ready()
    scale.execute(Told(perfect, tokens=20), twospeed, traces, stages.always, limit=limit)
    assert (len(traces[0].results), traces[0].spent["solve"]) == (solved, spent)


def test_the_limit_is_one_on_thinking_alone():
    traces = ready()
    scale.execute(Told(perfect), twospeed, traces, stages.never, limit=2)
    assert traces[0].answer == TOY.answer


def test_a_reply_without_an_end_has_no_result():
    traces = ready()
    scale.execute(Told(perfect, ended=False), twospeed, traces, stages.never)
    assert (traces[0].results, traces[0].answer) == ([], None)


def test_outlines_of_different_lengths_run_side_by_side():
    traces = [Trace(TOY, 0, steps=STEPS[:1]), Trace(TOY, 1, steps=[]), *ready()]
    scale.execute(Told(perfect), twospeed, traces, stages.never)
    assert [t.answer for t in traces] == [111, None, TOY.answer]


@pytest.mark.parametrize("tau", [0.9, 0.7, 0.5, 0.2])
def test_the_pipeline_is_the_product_of_its_steps(tau):
    """Each mode's errors are known; the last score is 0.9, the product's 0.7, the sum's 0.3."""
    chance = {"*=": 0.5, "*<": 0.9, "+=": 0.8, "+<": 0.7}
    toy = twospeed.Problem(11, (("*", 7), ("+", 4), ("+", 2)))
    traces = scale.scale(Scripted("*7+4+2", chance, SAYS), twospeed, [toy], range(3000), k=2, tau=tau)
    modes = ["<" if score > tau else "=" for score in (0.7, 0.3, 0.9)]
    exact = np.prod([chance[sign + mode] for sign, mode in zip("*++", modes, strict=True)])
    assert np.mean([t.answer == toy.answer for t in traces]) == pytest.approx(exact, abs=0.03)
    assert {t.spent["solve"] for t in traces} == {sum(20 if mode == "<" else 4 for mode in modes)}
    assert {t.spent["plan"] for t in traces} == {2 * 7 + 2}
    assert {t.spent["judge"] for t in traces} == {3 * 4}
    assert traces[0].scores == [0.7, 0.3, 0.9]
    assert {t.spent["calls"] for t in traces} == {2 + 1 + 3 + 3}


def test_at_the_last_score_no_step_is_thought_about():
    for tau, hard in ((0.9, 0), (0.8999, 1)):
        [trace] = scale.scale(Scripted("*3*8+5*9", dict.fromkeys(("*=", "*<", "+=", "+<"), 1.0), SAYS), twospeed, [TOY],
                              [0], tau=tau)  # fmt: skip
        assert (sum(trace.hard), trace.answer) == (hard, TOY.answer)


def test_the_last_step_can_become_the_question():
    words = english.roles()
    plan = '{"step1": "a", "step2": "b"}'
    ask = Told(lambda prompt, run, draw: plan if prompt.startswith("Split") else "0.3")
    [trace] = scale.prepare(ask, words, ["Why?"], [0], 2, question=lambda problem: problem)
    assert trace.steps == ["a", "Why?"]
    assert trace.scores == [0.3, 0.9]


# -- the model of allocations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_allocations_are_all_products_and_sums(steps):
    success, tokens = rng(steps).random((steps, 2)), rng(steps).integers(1, 50, (steps, 2))
    modes, spent, hit = scale.allocations(success, tokens)
    assert len({tuple(mode) for mode in modes}) == 2**steps
    for mode, cost, chance in zip(modes, spent, hit, strict=True):
        assert cost == sum(tokens[i, int(m)] for i, m in enumerate(mode))
        assert chance == pytest.approx(np.prod([success[i, int(m)] for i, m in enumerate(mode)]))


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_holds_what_nothing_beats(seed):
    tokens, hit = rng(seed).integers(1, 9, 40), rng(seed).random(40)
    kept = scale.frontier(tokens, hit)
    for i, j in product(range(40), repeat=2):
        if kept[i]:
            assert not (tokens[j] <= tokens[i] and hit[j] > hit[i])
            assert not (tokens[j] < tokens[i] and hit[j] >= hit[i])
    for i in np.flatnonzero(~kept):
        assert any(tokens[j] <= tokens[i] and hit[j] >= hit[i] for j in np.flatnonzero(kept))


def test_the_first_exercise():
    modes, tokens, hit = scale.allocations([[0.6, 0.95], [0.95, 0.96]], [[4, 40], [4, 40]])
    found = {tuple(m.tolist()): h for m, t, h in zip(modes, tokens, hit, strict=True) if t == 44}
    assert found == pytest.approx({(True, False): 0.9025, (False, True): 0.576})


# -- asking ------------------------------------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=34, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return Llama.from_transformers(LlamaForCausalLM(config).eval())


@pytest.mark.parametrize(("tau", "k", "p"), [(0.6, 20, 0.95), (1.3, 5, 0.8), (1.0, 34, 0.3)])
def test_the_law_is_that_of_transformers(tau, k, p):
    logits = torch.randn(40, 34, generator=torch.Generator().manual_seed(1)) * 3
    expected = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, TemperatureLogitsWarper(tau)(None, logits)))
    found = stages.nucleus(logits, torch.full((40,), tau), top_k=k, top_p=p)
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-6, rtol=1e-5)
    cold = stages.nucleus(logits, torch.zeros(40))
    assert (cold.argmax(-1) == logits.argmax(-1)).all()
    torch.testing.assert_close(cold.amax(-1), torch.ones(40))


def test_a_speaker_repeats_itself_and_runs_differ():
    speaker = stages.Speaker(small_model(), seeds=6, temperature=2.0, seed=3)
    first = speaker(["D12+3|", "D9|"], [0, 4], most=6)
    again = speaker(["D9|", "D12+3|", "D7*8|"], [4, 0, 1], most=6)
    assert again[:2] == first[::-1]
    runs = {said.text for said in speaker(["D12+3|"] * 6, range(6), most=6)}
    assert len(runs) > 2
    draws = {speaker(["D12+3|"], [2], most=6, draw=draw, draws=4)[0].text for draw in range(4)}
    assert len(draws) > 1


def test_a_speaker_counts_as_the_sampler_does():
    model = small_model()
    speaker = stages.Speaker(model, seeds=40, temperature=1.0, law=answers.tempered, seed=5)
    run = answers.sample(model, answers.read_prefix(model, []), [twospeed.encode("D12+3|")], [1.0] * 40, new_tokens=8,
                         stop=[twospeed.STOP], seed=[5, 0])  # fmt: skip
    said = speaker(["D12+3|"] * 40, range(40), most=8)
    assert [s.tokens for s in said] == run.written[0].tolist()
    assert [s.text for s in said] == [twospeed.decode(row) for row in run.tokens[0]]
    assert [s.ended for s in said] == [s.tokens == len(s.text) + 1 for s in said]
    assert {True, False} == {s.ended for s in said}
    assert {s.read for s in said} == {6}


# -- rivals and accounts -----------------------------------------------------------------------------------------------


def test_majority_takes_the_most_frequent_answer_of_whole_monologues():
    said = ["001*2<>005;", "x", "001*2<>007;", "001*2<>007;", "001*2<>005;", "+"]
    ask = Told(lambda prompt, run, draw: said[draw])
    traces = [Trace(TOY, 0)]
    stages.talk(ask, twospeed, traces, votes=4)
    assert traces[0].answer == 7
    assert traces[0].spent["solve"] == sum(len(text) + 1 for text in said[:4])
    stages.talk(Told(lambda *_: said[0], ended=False), twospeed, traces)
    assert traces[0].answer is None


def test_a_cut_monologue_goes_on_from_its_summary():
    whole, ask = {}, None

    def reply(prompts, runs, *, most, draw=0, draws=1, stop=None):
        found = []
        for prompt in prompts:
            if prompt.endswith("S"):
                head, _, begun = prompt[1:-1].partition("|")
                outline = whole[head]
                left = twospeed.remaining(twospeed.read_problem(head), outline, begun.count(";"))
                found.append(Said(left.text, 9, True, len(prompt)))
                continue
            problem = twospeed.read_problem(prompt[1:-1])
            whole[problem.text] = twospeed.random_outline(problem, rng(1))
            text = twospeed.monologue(problem, whole[problem.text])[:-1]
            found.append(Said(text[:most], min(len(text) + 1, most), len(text) < most, len(prompt)))
        return found

    problems = twospeed.problems(30, rng(2))
    for cut in (30, 60):
        traces = [Trace(problem, 0) for problem in problems]
        stages.iterate(reply, twospeed, traces, cut=cut, rounds=20)
        assert [t.answer for t in traces] == [p.answer for p in problems]
    traces = [Trace(problem, 0) for problem in problems]
    stages.iterate(reply, twospeed, traces, cut=30, rounds=1)
    assert sum(t.answer is not None for t in traces) < len(traces)
    assert ask is None


def test_a_summary_that_is_no_problem_ends_the_run():
    ask = Told(lambda prompt, *_: "junk" if prompt[-1] == "S" else "037*", ended=False)
    traces = [Trace(TOY, 0)]
    stages.iterate(ask, twospeed, traces, cut=4)
    assert (traces[0].answer, len(ask.asked)) == (None, 2)


def test_hindsight_thinks_where_at_once_is_wrong():
    ask = Told(lambda prompt, *_: "000" if "*8=" in prompt[-4:] else perfect(prompt))
    traces = ready()
    scale.execute(ask, twospeed, traces, stages.hindsight(ask, twospeed))
    assert (traces[0].hard, traces[0].answer) == ([False, True, False, False], TOY.answer)


def test_a_trace_begins_again_with_its_plans_and_its_bill():
    trace = Trace(TOY, 3, steps=list(STEPS), scores=[0.1], results=[1], hard=[True], spent=Counter(plan=7), drawn=2)
    again = trace.again(scores=[0.4])
    assert (again.steps, again.scores, again.results, again.hard) == (STEPS, [0.4], [], [])
    assert (again.run, again.spent, again.drawn) == (3, {"plan": 7}, 2)
    again.spent["plan"] += 1
    again.steps.append(1)
    assert (trace.spent["plan"], trace.steps) == (7, STEPS)


def test_both_ways_chooses_on_dev_and_reports_on_test():
    def runs(which, method, right, solve, tau=None):
        rows = {
            "item": range(4),
            "right": right,
            "solve": solve,
            "total": solve,
            "method": method,
            "set": which,
            "tau": tau,
        }
        return pd.DataFrame(rows)

    table = pd.concat([
        runs("dev", "SCALE", [1, 1, 1, 1], 40.0, 0.2), runs("dev", "SCALE", [1, 1, 1, 0], 20.0, 0.5),
        runs("dev", "SCALE", [1, 0, 0, 0], 10.0, 0.9), runs("dev", "CoT", [1, 1, 1, 0], 30.0),
        runs("test", "SCALE", [1, 1, 1, 0], 44.0, 0.2), runs("test", "SCALE", [1, 1, 0, 0], 22.0, 0.5),
        runs("test", "SCALE", [1, 1, 1, 1], 11.0, 0.9), runs("test", "CoT", [1, 0, 0, 0], 33.0),
    ])  # fmt: skip
    both = stages.both_ways(table, ["CoT"], accounts=("solve",)).set_index("equal")
    assert both.tau.to_dict() == {"accuracy": 0.5, "tokens": 0.5}
    assert both.gain["accuracy"] == pytest.approx(25)
    assert both.ratio["tokens"] == pytest.approx(22 / 33)
    assert both.gain_low["accuracy"] <= 25 <= both.gain_high["accuracy"]


def test_settings_are_the_thriftiest_and_the_best_within_a_budget():
    table = pd.DataFrame({"right": [0.9, 0.8, 0.5], "solve": [40, 30, 10]}, index=[0.2, 0.5, 0.9])
    assert [stages.thriftiest(table, "solve", floor) for floor in (0.79, 0.85, 0.95, 0.0)] == [0.5, 0.2, 0.2, 0.9]
    assert [stages.best_below(table, "solve", budget) for budget in (35, 100, 5)] == [0.5, 0.2, 0.9]


def test_runs_are_graded_one_row_each():
    right = Trace(
        TOY, 0, steps=[1, 2], results=[5, TOY.answer], hard=[True, False], spent=Counter(solve=9, plan=4, judge=3)
    )
    table = stages.graded([right, Trace(TOY, 1)], 2, set="dev")
    assert table.item.tolist() == [0, 0]
    assert table.right.tolist() == [True, False]
    assert table.loc[0, ["solve", "planning", "total", "hard", "set"]].tolist() == [9, 7, 16, 0.5, "dev"]


# -- the world ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_python():
    for problem in twospeed.problems(200, rng(5)):
        nested = str(problem.start)
        for step in problem.steps:
            nested = f"({nested}{twospeed.written([step])})"
        assert problem.answer == eval(nested) % 1000
        assert twospeed.read_problem(problem.text) == problem
        outline = twospeed.random_outline(problem, rng(problem.start))
        assert twospeed.parse(twospeed.written(outline)) == outline
        results = twospeed.values(problem.start, outline)
        assert results[-1] == problem.answer
        said = twospeed.monologue(problem, outline)
        assert twospeed.final(said[:-1]) == problem.answer
        for done in range(len(outline) + 1):
            assert twospeed.remaining(problem, outline, done).answer == problem.answer


@pytest.mark.parametrize(("value", "step", "pad"), [
    (37, ("*", 6), "742423182200002"), (95, ("+", 7), "512910001"), (12, ("+", 3), "205"), (100, ("-", 1), "019019100"),
    (3, ("-", 5), "318019019"),
])  # fmt: skip
def test_scratchpads_are_written_digit_by_digit(value, step, pad):
    assert twospeed.scratchpad(value, step) == pad


def test_the_last_digits_of_a_scratchpad_are_the_result():
    for value, digit in product(range(0, 1000, 7), range(1, 10)):
        pad = twospeed.scratchpad(value, ("*", digit))
        assert pad[14] + pad[9] + pad[4] == f"{value * digit % 1000:03}"
        for sign in "+-":
            pad, result = twospeed.scratchpad(value, (sign, digit)), f"{twospeed.apply(value, (sign, digit)):03}"
            blocks = [pad[i : i + 3] for i in range(0, len(pad), 3)]
            assert "".join(block[2] for block in blocks[::-1]) == result[3 - len(blocks) :]
            assert result[: 3 - len(blocks)] == f"{value:03}"[: 3 - len(blocks)]


@pytest.mark.parametrize("text", ["", "*", "*x", "3*", "*3*", "*3 +5", "037*3"])
def test_what_is_no_outline_is_refused(text):
    assert twospeed.parse(text) is None


def test_replies_are_read_strictly():
    assert [twospeed.result(text) for text in ("123", "99>045", "1>2>003", "12", "1234", "", "12x")] == [
        123, 45, 3, None, None, None, None]  # fmt: skip
    assert [twospeed.score(text) for text in ("0.7", "1", "1.1", "-0.1", "x", "nan")] == [
        0.7,
        1,
        None,
        None,
        None,
        None,
    ]
    assert [twospeed.version(text) for text in ("a", "h", "i", "", "ab")] == [0, 7, None, None, None]
    assert [twospeed.read_problem(text) for text in ("12+3", "012", "012+", "012*123")] == [
        None, twospeed.Problem(12, ()), None, None]  # fmt: skip


def test_factorings_multiply_back():
    assert twospeed.factorings(12) == ((2, 6), (3, 4), (4, 3), (6, 2))
    assert twospeed.factorings(7) == ((7,),)
    assert (8,) in twospeed.factorings(8)
    assert all(len(twospeed.factorings(number)) > 1 for number in twospeed.FACTORS)


def test_english_outlines_are_json_with_steps_in_order():
    read = english.roles().parse
    assert read('Sure: {"step1": "add", "step2": "halve"} done') == ["add", "halve"]
    for text in ("", "{}", '{"step2": "a"}', '{"step1": 3}', "[1]", '{"step1": "a"', "no"):
        assert read(text) is None
    assert english.roles().result("so 3 + 4 = 7.") == "7"
    assert english.roles().score("about 0.25") == 0.25


# -- the shipped model -------------------------------------------------------------------------------------------------


def test_the_shipped_model_is_better_at_thinking_than_at_once():
    """As stored, in 8 bits: what the notebook's experiments rest on."""
    model, found = twospeed.load(), {}
    for hard in (False, True):
        asked, wanted, signs = [], [], []
        for problem in twospeed.problems(60, rng(11)):
            outline = twospeed.random_outline(problem, rng(problem.start))
            results = twospeed.values(problem.start, outline)
            asked += [twospeed.solve(problem, outline[:i], step, results, hard) for i, step in enumerate(outline)]
            wanted, signs = wanted + results, signs + [step[0] for step in outline]
        said = stages.Speaker(model, temperature=0.0)(asked, [0] * len(asked), most=32)
        right = pd.Series([twospeed.result(s.text) == value for s, value in zip(said, wanted, strict=True)])
        found[hard] = right.groupby([sign == "*" for sign in signs]).mean()
    assert found[True].min() > 0.97
    assert found[False].max() < 0.95
    assert found[False][True] < found[False][False]  # products are the harder ones


MUTATIONS = [
    ("len(t.versions) < k", "len(t.versions) <= k"),
    ("if said.ended else None\n        trace.versions", "if True else None\n        trace.versions"),
    ("tries=rounds * k", "tries=k"),
    ("named < len(trace.versions)", "named <= len(trace.versions)"),
    ("list(trace.versions[0] if", "list(trace.versions[-1] if"),
    ("trace.results if seen else None", "trace.results if not seen else None"),
    ("trace.steps[:place], trace.steps[place]", "trace.steps[: place + 1], trace.steps[place]"),
    ("[1.0] * (len(trace.scores) == place)", "[0.0] * (len(trace.scores) == place)"),
    ("place + 1 == len(trace.steps)", "place == len(trace.steps)"),
    ("trace.scores[place] > tau", "trace.scores[place] >= tau"),
    ("len(t.steps) > place == len(t.results)", "len(t.steps) > place"),
    ("said.tokens > limit", "said.tokens >= limit"),
    ("over = trace.hard[place] and", "over = True and"),
    ("said._replace(tokens=limit) if over", "said if over"),
    ("t.results, t.hard[place])", "t.results, not t.hard[place])"),
    (".prod(1)", ".mean(1)"),
    ("(-accuracy, tokens)", "(accuracy, tokens)"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    this = sys.modules[__name__]
    monkeypatch.setattr(this, "scale", mutate(NAME, old, new, tmp_path, monkeypatch))
    of_the_method = (check for check in checks(this, {}) if "scale" in check.__defaults__[0].__code__.co_names)
    assert any(map(fails, of_the_method)), f"nothing noticed that {old!r} became {new!r}"
