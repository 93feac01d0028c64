"""Mirror speculative decoding and draft trees: traces against passes by hand, arithmetic against brute force, a real
worker thread against the greedy text."""

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from recipe_scripts import ROWS, load, run, write_prompts, write_tied
from small_checkpoint import VOCABULARY, small_tokenizer

from eetrain.data import PromptResponse
from eetrain.data.tokenization import TextEncoder
from eetrain.evaluation import read_samples
from eetrain.evaluation.speed_model import RoundCosts

GAMMA, WIDTH = 4, 3


@pytest.fixture
def arithmetic(monkeypatch):
    return load(monkeypatch, "mirror_model")


@pytest.fixture
def traced(monkeypatch, tmp_path):
    """The traces, the model and the prompts they are of."""
    module = load(monkeypatch, "greedy_traces")
    model = write_tied(tmp_path / "model")
    with torch.no_grad():  # so near to the full depth that exit 1 is right now and then
        for block in model.causal_lm.model.layers[1:]:
            block.self_attn.o_proj.weight.mul_(0.3)
            block.mlp.down_proj.weight.mul_(0.3)
    encoder = TextEncoder(small_tokenizer(), VOCABULARY)
    samples = read_samples(str(write_prompts(tmp_path / "data.csv")), PromptResponse("{mr}", "{ref}"), encoder)
    options = {"gamma": GAMMA, "width": WIDTH, "new_tokens": 12, "batch_size": 4}
    texts = module.traces(model, encoder, samples, [1, 3], **options)
    return texts, model, [sample.prompt_ids for sample in samples]


@torch.no_grad()
def exit_probabilities(model, layer, ids):
    return model.logits(model(torch.tensor([ids])), None if layer == 4 else layer)[0, -1].softmax(-1)


def test_traces_are_what_single_passes_give(traced):
    texts, model, prompts = traced
    assert len(texts) == len(ROWS)
    for text, prompt in zip(texts, prompts, strict=True):
        for place, true in enumerate(text.truth):
            ids = [*prompt, *text.truth[:place]]
            for layer in (1, 3, 4):
                order = exit_probabilities(model, layer, ids).argsort(descending=True).tolist()
                assert text.ranks[layer][place] == order.index(true)
            drafts = list(ids)
            for guesses, sure in zip(text.rollouts[1][place].guesses, text.rollouts[1][place].confidence, strict=True):
                chances = exit_probabilities(model, 1, drafts)
                assert list(guesses) == chances.argsort(descending=True)[:WIDTH].tolist()
                assert sure == pytest.approx(float(chances.max()), rel=1e-5)
                drafts.append(guesses[0])
            assert len(drafts) == len(ids) + GAMMA
        assert set(text.ranks[4]) == {0}, "the text is the full depth's own"


def test_hits_and_recall_grow_with_kappa_up_to_certainty(traced, arithmetic):
    texts, *_ = traced
    for layer in (1, 3):
        shares = [arithmetic.recall(texts, layer, kappa) for kappa in range(1, VOCABULARY + 1)]
        assert shares == sorted(shares)
        assert 0 < shares[0] < 1
        assert shares[-1] == 1
        for gamma in (1, GAMMA):
            rates = [arithmetic.hit_rate(texts, 1, layer, gamma, kappa) for kappa in range(1, VOCABULARY + 1)]
            assert rates == sorted(rates)
            assert rates[0] < 1
            assert rates[-1] == 1, "with all tokens as guesses the correction is among them"


@pytest.mark.parametrize(
    ("draft_exit", "guess_exit", "gamma", "kappa"),
    [(1, 1, 1, 1), (1, 3, 2, 2), (1, 3, 4, 5), (3, 1, 3, 4), (3, 3, 2, 1), (1, 3, 1, VOCABULARY)],
)
def test_a_real_worker_gives_the_greedy_text_and_the_hits_of_the_traces(
    traced, arithmetic, monkeypatch, draft_exit, guess_exit, gamma, kappa
):
    texts, model, prompts = traced
    emulation = load(monkeypatch, "mirror_emulation")
    mirror = emulation.Mirror(model, draft_exit, guess_exit, gamma, kappa)
    for text, prompt in zip(texts[:3], prompts[:3], strict=True):
        found = mirror.decode(prompt, len(text.truth))
        assert tuple(found.tokens) == text.truth
        assert found.hits == arithmetic.hits(text, draft_exit, guess_exit, gamma, kappa)
        assert found.hits
    shorter = mirror.decode(prompts[0], 12, {texts[0].truth[3]})
    first = texts[0].truth.index(texts[0].truth[3])
    assert tuple(shorter.tokens) == texts[0].truth[: first + 1], "ends of text end it"


@pytest.mark.parametrize("guess_exit", [1, 3])
def test_the_emulation_does_use_branches(traced, monkeypatch, guess_exit):
    """Wrong branches must not go unnoticed: drafts of nonsense are all rejected, and the text stays what it is."""
    texts, model, prompts = traced
    emulation = load(monkeypatch, "mirror_emulation")
    mirror, rounds = emulation.Mirror(model, 1, guess_exit, 3, 4), []
    honest, one_round = mirror.worker.branches, mirror._round
    nonsense = (texts[0].truth[0] + 1) % VOCABULARY
    monkeypatch.setattr(
        mirror.worker, "branches", lambda *args: {key: [nonsense] * 3 for key in honest(*args)}, raising=True
    )
    monkeypatch.setattr(mirror, "_round", lambda *args: rounds.append(args[2]) or one_round(*args))
    found = mirror.decode(prompts[0], len(texts[0].truth))
    assert tuple(found.tokens) == texts[0].truth
    # The branch of the prompt's pass is no hit of a round, that of the last round is not needed any more.
    assert sum(window == [nonsense] * 3 for window in rounds[2:]) == sum(found.hits[:-1]) > 0


def random_text(arithmetic, draw):
    """Guesses of three tokens of five, the truth often among them."""
    length = draw.randint(1, 12)
    truth = tuple(draw.randrange(5) for _ in range(length))

    def rollout(start):
        rows = []
        for place in range(GAMMA):
            row = draw.sample(range(5), WIDTH)
            true = truth[start + place] if start + place < length else 9
            if draw.random() < 0.6 and true not in row:
                row[0] = true
            rows.append(tuple(row))
        return arithmetic.Rollout(tuple(rows), tuple(draw.random() for _ in range(GAMMA)))

    ranks = {6: tuple(draw.randrange(5) for _ in range(length))}
    return arithmetic.Text(truth, ranks, {3: tuple(rollout(start) for start in range(length))})


def paths(text, tree, start, gamma):
    """All paths of a tree of drafts, written out; a side path grows by what the exit drafts after the true text, which
    is what it would draft there if the path is right so far, and of no matter if it is not."""
    rollout = text.rollouts[3][start]
    chain = [guesses[0] for guesses in rollout.guesses[:gamma]]
    yield chain
    where = {"none": [], "first": [0], "every": range(gamma)}.get(tree.kind)
    if where is None:
        where = [sorted(range(gamma), key=lambda place: (rollout.confidence[place], place))[0]]
    for place in where:
        for other in rollout.guesses[place][1 : tree.width]:
            side = [*chain[:place], other]
            if tree.grown and start + place + 1 < len(text.truth):
                following = text.rollouts[3][start + place + 1].guesses
                side += [guesses[0] for guesses in following[: gamma - place - 1]]
            yield side


def test_walks_through_trees_are_those_of_all_their_paths(arithmetic):
    draw, gained = random.Random(0), 0
    trees = [arithmetic.CHAIN]
    trees += [arithmetic.Tree(k, w, g) for k in ("first", "unsure") for w in (2, 3) for g in (False, True)]
    trees += [arithmetic.Tree("every", width) for width in (2, 3)]
    for _ in range(300):
        text, gamma = random_text(arithmetic, draw), draw.randint(1, GAMMA)
        for tree in trees:
            start, rounds = 1, []
            while start < len(text.truth):
                rest = text.truth[start:]
                right = max(
                    next(
                        (n for n, (a, b) in enumerate(zip(path, rest, strict=False)) if a != b),
                        min(len(path), len(rest)),
                    )
                    for path in paths(text, tree, start, gamma)
                )
                rounds.append(min(right + 1, len(rest)))
                start += rounds[-1]
            found = list(arithmetic.walk(text, 3, gamma, tree))
            assert [one.tokens for one in found] == rounds
            assert all(one.whole == (one.start + one.accepted < len(text.truth)) for one in found)
            gained += len(list(arithmetic.walk(text, 3, gamma))) > len(rounds)
    assert gained > 100, "trees do save rounds here"


def test_hits_by_hand(arithmetic):
    """Truth a b c d e; the exit drafts b right and then x: the branch is b + c, rank 2 at the guessing exit."""
    a, b, c, d, e, x = range(6)
    first = arithmetic.Rollout(((b, x, a), (x, c, d)), (0.9, 0.4))
    then = arithmetic.Rollout(((d, x, a), (e, c, a)), (0.3, 0.8))
    never = arithmetic.Rollout(((x, a, b), (x, a, b)), (0.5, 0.5))
    text = arithmetic.Text((a, b, c, d, e), {6: (0, 0, 2, 0, 0)}, {3: (never, first, never, then, never)})
    rounds = list(arithmetic.walk(text, 3, 2))
    assert [(one.start, one.accepted, one.tokens, one.whole) for one in rounds] == [(1, 1, 2, True), (3, 2, 2, False)]
    assert arithmetic.hits(text, 3, 6, 2, 2) == [False]
    assert arithmetic.hits(text, 3, 6, 2, 3) == [True]
    assert arithmetic.tokens_a_round([text], 3, 2) == 2
    assert arithmetic.second_chances([text], 3, 2) == {
        "rounds_with_a_wrong_draft": 1,
        "second_guess_right": 1,
        "third_guess_right": 0,
        "wrong_at_first": 0,
        "wrong_at_least_confident": 1,
    }
    assert arithmetic.gain(text, 3, 1, 1, 2, arithmetic.Tree("unsure")) == 1
    assert arithmetic.gain(text, 3, 1, 1, 2, arithmetic.Tree("first")) == 0
    # Its two rounds start at 1, where the second draft is the least sure, and at 4, where both are as sure.
    assert arithmetic.side_depth([text], 3, 2, arithmetic.Tree("unsure", grown=True)) == (0 + 1) / 2
    assert arithmetic.side_depth([text], 3, 2, arithmetic.Tree("first", grown=True)) == 1


def test_steps_of_mirror(arithmetic):
    costs = arithmetic.MirrorCosts(head=1.0, rest=5.0, branches=3.0, redraft=2.0)
    assert costs.step(1.0) == 6
    assert costs.step(0.25) == 6 + 1.5
    assert replace(costs, branches=7.0).step(0.5) == 1 + 7 + 1
    assert arithmetic.rollout_seconds(early=2.0, head=0.5, gamma=3) == 4 * 2 + 3 * 0.5
    assert [arithmetic.num_branches(2, 4, same) for same in (False, True)] == [10, 6]
    assert [arithmetic.between({1: 1.0, 4: 4.0, 8: 16.0}, x) for x in (1, 2, 4, 6, 10)] == [1, 2, 4, 10, 22]
    assert arithmetic.between({3: 2.0}, 7) == 2


def passes(costs, kind, width, grown, gamma, place):
    """A round's time, pass by pass, where the tree branches at one place."""
    chain, side = costs.chain, width - 1
    clock, waiting = 0.0, 1 + gamma
    many = side * (costs.early_more + costs.head_more)
    for step in range(gamma):
        clock += chain.early + chain.head
        if kind == "first" and grown and step:
            clock += many
    if kind == "unsure" and grown:
        for _ in range(gamma - 1 - place):
            clock += chain.early + chain.head + (side - 1) * (costs.early_more + costs.head_more)
    places = {"none": 0, "every": gamma}.get(kind, 1)
    clock += chain.early + places * side * costs.early_more  # the last of every path is verified, nothing follows
    waiting += places * side * (1 + (gamma - 1 - place if grown else 0))
    return clock + chain.verify + chain.verify_more * (waiting - 1)


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("gamma", [1, 3, 4])
def test_rounds_of_trees(arithmetic, width, gamma):
    chain = RoundCosts(early=3.0, head=0.5, verify=9.0, verify_more=1.0, full=12.5)
    costs = arithmetic.TreeCosts(chain, early_more=0.25, head_more=0.125)
    cases = [("none", False, 0), ("first", False, 0), ("first", True, 0), ("every", False, 0)]
    cases += [("unsure", grown, place) for grown in (False, True) for place in range(gamma)]
    for kind, grown, place in cases:
        tree = arithmetic.Tree(kind, width, grown)
        depth = gamma - 1 - place if grown else 0.0
        expected = passes(costs, kind, width, grown, gamma, place)
        assert costs.round(gamma, tree, depth) == pytest.approx(expected), (kind, grown, place)


def test_the_whole_script(monkeypatch, tmp_path, capsys):
    script = load(monkeypatch, "mirror_and_trees")
    monkeypatch.setattr(sys.modules["mirror_times"], "ROWS", (1, 4))
    write_tied(tmp_path / "model")
    capsys.readouterr()
    flags = ["--draft_exits", "1", "--guess_exits", "1,3", "--gammas", "1,3", "--kappas", "1,3", "--new_tokens", 8]
    before = torch.get_num_threads()
    try:
        run(monkeypatch, script, tmp_path, *flags, "--repeats", 1, "--emulate", 2, "--threads", 2, "--out", tmp_path)
        assert torch.get_num_threads() == 2, "although parts were timed with one"
    finally:
        torch.set_num_threads(before)
    found = json.loads((tmp_path / "mirror_and_trees.json").read_text())
    cells = [tuple(row[key] for key in ("exit", "guess_exit", "gamma", "kappa")) for row in found["mirror"]]
    assert cells == [(1, guess, gamma, kappa) for guess in (1, 3) for gamma in (1, 3) for kappa in (1, 3)]
    for one, three in zip(found["mirror"][::2], found["mirror"][1::2], strict=True):
        assert one["hit_rate"] <= three["hit_rate"]
        expected = three["head_ms"] + max(three["rest_ms"], three["branches_ms"])
        assert three["step_ms"] == pytest.approx(expected + (1 - three["hit_rate"]) * three["redraft_ms"])
    assert found["emulated"]["same_tokens"] == found["emulated"]["hits_as_traced"] == 2
    assert [row["kind"] for row in found["trees"]].count("none") == 2
    assert len(found["trees"]) == 2 * (1 + 10)
    assert set(found["costs"]) == {"1"}
    assert found["threads"] in (1, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == found["verdict"]
    assert [line.split(":")[0] for line in lines[-3:]] == ["chain", "tree", "Mirror"]


@pytest.mark.parametrize(
    ("speeds", "words"), [((1.2, 1.3, 1.0), ("win", "lose")), ((1.2, 1.21, 1.5), ("change nothing", "win"))]
)
def test_the_verdict_names_the_winner(monkeypatch, speeds, words):
    script = load(monkeypatch, "mirror_and_trees")
    row = {"exit": 3, "gamma": 4, "width": 2, "grown": True, "guess_exit": 6, "kappa": 2, "hit_rate": 0.5}
    trees = [row | {"kind": "none", "speedup": speeds[0]}, row | {"kind": "none", "speedup": 0.9}]
    trees.append(row | {"kind": "first", "speedup": speeds[1]})
    row |= {"step_ms": 10.0, "rest_ms": 4.0, "branches_ms": 5.0}
    mirror = [row | {"speedup": speeds[2] * 1.25}, row | {"speedup": 0.1}]
    emulated = {"together_ms": 3.0, "longer_alone_ms": 2.0}  # 5 ms alone are 7.5 ms, the step 12.5 ms
    lines = script.verdict({"trees": trees, "mirror": mirror, "emulated": emulated})
    assert lines[0] == f"chain: {speeds[0]:.3f} x the full depth (exit 3, 4 drafts)"
    for line, word in zip(lines[1:], words, strict=True):
        assert f"would {word}" in line
    assert f" at best: {speeds[2]:.3f} x the full depth (exit 3, guesses at exit 6" in lines[2]
