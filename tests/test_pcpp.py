"""The method cells of diffusion/pcpp against a one-process reference, exact fractions and messages counted by hand."""

import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import cloudpickle
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from test_mutations import fails, mutate
from torch import nn

from workbook import fleet, notebook, patchparallel
from workbook.wire import Board, EchoWire, Mail, Wire, in_threads, in_turn, slowest, summed

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import the tests
NAME, LEVELS = "diffusion/pcpp", (900.0, 700.0, 500.0)


@pytest.fixture(scope="module")
def pcpp():
    return notebook.load_method(NAME)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny():
    """A U-Net with every kind of layer that looks beyond a strip, on two levels."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    network = UNet2DModel(sample_size=16, in_channels=1, out_channels=1, mid_block_type=None, **blocks, **shape)
    for layer in network.modules():  # so that a mistake in any layer shows
        if isinstance(layer, nn.GroupNorm):
            nn.init.normal_(layer.weight, 1.0, 0.3)
            nn.init.normal_(layer.bias, 0.0, 0.3)
    return network.eval().requires_grad_(False)


NETWORK = tiny()
PICTURES = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(1))  # higher than wide would hide mistakes


@torch.inference_mode()
def steps(model, pictures=PICTURES, levels=LEVELS, note=int):
    """What a model says in a few crude steps."""
    said, x = [], pictures
    for level in levels:
        note()
        said.append(model(x, torch.full((len(x),), level)).sample)
        x = x - 0.2 * said[-1]
    return torch.stack(said)


def strips(wire, method, scheme, note=None):
    """The same by one member of a group, and what it received (since the last call of note, a method of the wire)."""
    said = steps(method.InStrips(NETWORK, scheme(wire)), note=getattr(wire, note or "none", int))
    return said, dict(wire.received), dict(wire.messages)


def run(method, size, scheme, note=None):
    return in_threads(size, strips, method, scheme, note, timeout=20)


def apart(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


# -- a reference that knows no wire ------------------------------------------------------------------------------------


def captured(network, x, level, size):
    """What every layer of the uncut network takes in, cut into strips: {name: [edges, moments or keys of each]}."""
    found, hooks = {}, []

    def note(name, layer, arguments):
        rows = arguments[0].chunk(size, 2)  # rows of a map, or tokens: pixels in the order of rows
        if isinstance(layer, nn.GroupNorm):
            found[name] = [moments(part, layer.num_groups) for part in rows]
        elif isinstance(layer, Attention):
            tokens = layer.group_norm(arguments[0].flatten(2)).mT
            found[name] = list(torch.cat([layer.to_k(tokens), layer.to_v(tokens)], 2).chunk(size, 1))
        else:
            found[name] = [(part[:, :, :1], part[:, :, -1:]) for part in rows]

    for name, layer in network.named_modules():
        if isinstance(layer, nn.GroupNorm | Attention) or (
            isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
        ):
            hooks.append(layer.register_forward_pre_hook(lambda layer, a, name=name: note(name, layer, a)))
    out = network(x, level).sample
    for hook in hooks:
        hook.remove()
    return found, out


def moments(x, groups):
    flat = x.flatten(2).reshape(len(x), groups, -1)
    return torch.stack([flat.mean(2), flat.square().mean(2)])


class Reader:
    """One strip that reads what all strips had in the previous step from a table, and notes what it has now."""

    def __init__(self, kind, rank, size, share):
        self.kind, self.rank, self.size, self.share, self.before, self.now = kind, rank, size, share, {}, {}

    def halo(self, name, x):
        self.now[name] = (x[:, :, :1], x[:, :, -1:])
        zeros = torch.zeros_like(x[:, :, :1])
        above = self.before[name][self.rank - 1][1] if self.rank and self.kind != "alone" else zeros
        last = self.rank == self.size - 1 or self.kind == "alone"
        return above, zeros if last else self.before[name][self.rank + 1][0]

    def statistics(self, name, own):
        self.now[name] = own
        if self.kind == "alone":
            return own
        old = self.before[name]
        return sum(old) / self.size - old[self.rank] + own

    def keys(self, name, own):
        self.now[name] = own
        if self.kind == "alone":
            return own
        everyone = torch.cat([own if r == self.rank else t for r, t in enumerate(self.before[name])], 1)
        length = own.shape[1]
        token = [Fraction(k) for k in range(self.size * length)]
        first, last = ((self.rank - self.share) * length // 1, (self.rank + 1 + self.share) * length // 1)
        seen = [self.kind == "all" or first <= k < last for k in token]
        return everyone[:, torch.tensor(seen)]


@cache
@torch.inference_mode()
def reference(kind, size, share=Fraction(3, 10)):
    """The first step waits, the others read from the step before; all strips in one process, one after the other."""
    readers = [Reader(kind, rank, size, share) for rank in range(size)]
    parts = [patchparallel.on_strip(NETWORK, reader, rank, size) for rank, reader in enumerate(readers)]
    said, x, before = [], PICTURES, None
    for level in LEVELS:
        level = torch.full((len(x),), level)
        if before is None:
            before, out = captured(NETWORK, x, level, size)
        else:
            for reader in readers:
                reader.before, reader.now = before, {}
            out = torch.cat([part(x, level).sample for part in parts], 2)
            before = {name: [reader.now[name] for reader in readers] for name in readers[0].now}
        said.append(out)
        x = x - 0.2 * out
    return torch.stack(said)


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_strips_that_wait_are_the_network(pcpp, size):
    uncut = steps(NETWORK)
    for said, _, _ in run(pcpp, size, pcpp.Synchronous):
        assert apart(said, uncut) < 1e-5


def test_one_strip_is_the_network_itself(pcpp):
    for scheme in (pcpp.Synchronous, pcpp.Displaced, pcpp.Partial, pcpp.Alone):
        model = pcpp.InStrips(NETWORK, scheme(EchoWire(0, 1)))
        assert model.strip is NETWORK
        assert torch.equal(steps(model, levels=LEVELS[:1]), steps(NETWORK, levels=LEVELS[:1]))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["all", "part", "whole", "alone"])
def test_stale_steps_are_the_reference(pcpp, size, kind):
    scheme = {"all": pcpp.Displaced, "alone": pcpp.Alone}.get(kind, partial(pcpp.Partial, whole=kind == "whole"))
    expected = reference(kind, size)
    for said, _, _ in run(pcpp, size, partial(scheme, warmup=0)):
        assert apart(said, expected) < 1e-5
    assert apart(expected, steps(NETWORK)) > 1e-3  # what is stale matters
    assert apart(expected, reference("part" if kind == "all" else "all", size)) > 1e-4  # and so does what is seen


def test_messages_that_travel_together_change_nothing(pcpp):
    together = [run(pcpp, 2, partial(pcpp.Displaced, warmup=0, together=k))[0] for k in (1, 7, 1000)]
    assert all(torch.equal(together[0][0], said) for said, _, _ in together)
    assert all(together[0][1] == received for _, received, _ in together)
    assert together[0][2]["attention"] > together[2][2]["attention"]


def test_with_two_strips_and_all_of_the_neighbour_pcpp_is_distrifusion(pcpp):
    def both(size, **options):
        schemes = partial(pcpp.Partial, share=1.0, warmup=0, **options), partial(pcpp.Displaced, warmup=0)
        return [run(pcpp, size, scheme)[0][0] for scheme in schemes]

    assert torch.equal(*both(2))
    assert torch.equal(*both(2, whole=True))
    assert apart(*both(4)) > 1e-4


def test_mail_that_travels_together_changes_nothing(pcpp):
    together = [run(pcpp, 2, partial(pcpp.Partial, warmup=0, together=k))[1] for k in (1, 2, 1000)]
    assert all(torch.equal(together[0][0], said) for said, _, _ in together)
    assert all(together[0][1] == received for _, received, _ in together)
    assert together[0][2]["attention"] > together[2][2]["attention"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_whole_or_part_is_the_same_to_who_sees_it(pcpp, share):
    one, other = (run(pcpp, 4, partial(pcpp.Partial, share=share, whole=w, warmup=0)) for w in (False, True))
    assert torch.equal(one[1][0], other[1][0])
    if share < 1:
        assert one[1][1]["attention"] < other[1][1]["attention"]


def test_the_warm_up_waits_for_steps_zero_to_warmup(pcpp):
    scheme = pcpp.Displaced(EchoWire(0, 2), warmup=4)
    waits = []
    for _ in range(50):
        scheme.begin()
        waits.append(scheme.waits)
    assert waits == [True] * 5 + [False] * 45
    uncut = steps(NETWORK)
    for scheme in (pcpp.Displaced, pcpp.Partial, pcpp.Alone):
        said = run(pcpp, 2, partial(scheme, warmup=1))[0][0]
        assert apart(said[:2], uncut[:2]) < 1e-5
        assert apart(said[2], uncut[2]) > 1e-4


def test_strips_that_never_speak_send_their_output_only(pcpp):
    _, received, _ = run(pcpp, 2, partial(pcpp.Alone, warmup=-1))[0]
    assert received == {"output": len(LEVELS) * PICTURES.numel() * 4 // 2}


# -- what is seen and sent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("tokens", [4, 10, 64, 1024])
@pytest.mark.parametrize("share", ["0", "0.15", "0.3", "0.5", "1"])
def test_windows_are_those_of_exact_fractions(pcpp, size, tokens, share):
    p = Fraction(share)
    for rank in range(size):
        first, last = pcpp.window(rank, size, tokens, float(share))
        assert first == max(0, tokens * (rank - p) // 1)
        assert last == min(size * tokens, tokens * (rank + 1 + p) // 1)
        seen = [peer * tokens + k for peer, part in pcpp.parts(rank, size, tokens, float(share)).items()
                for k in range(tokens)[part]]  # fmt: skip
        own = range(rank * tokens, (rank + 1) * tokens)
        assert sorted([*seen, *own]) == list(range(first, last))


def test_the_window_is_lopsided_as_in_the_official_code(pcpp):
    assert pcpp.window(1, 4, 64, 0.3) == (64 - 20, 128 + 19)
    assert pcpp.parts(1, 4, 64, 0.3) == {0: slice(44, 64), 2: slice(0, 19)}
    assert pcpp.parts(0, 4, 64, 0.3).keys() == {1}
    assert pcpp.parts(3, 4, 64, 0.3).keys() == {2}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["everything", "whole", "part"])
def test_bytes_are_the_formula(pcpp, size, kind):
    scheme = pcpp.Displaced if kind == "everything" else partial(pcpp.Partial, whole=kind == "whole")
    counted = summed(received for _, received, _ in run(pcpp, size, partial(scheme, warmup=0), "reset"))
    assert counted == pcpp.received_bytes(patchparallel.posted(NETWORK, PICTURES, size), size, kind)


def test_bytes_by_hand(pcpp):
    """Eight strips, 32 tokens, 64 channels: a packet of 16 kB, 56 of them in DistriFusion and 14 in PCPP."""
    layer = [("attention", 2 * 32 * 64, 32), ("convolution", 100, 0)]
    found = {kind: pcpp.received_bytes(layer, 8, kind) for kind in ("everything", "whole", "part")}
    assert found["everything"] == {"attention": 56 * 16384, "convolution": 56 * 400}
    assert found["whole"] == {"attention": 14 * 16384, "convolution": 56 * 400}
    # of 32 tokens, 9.6 of each neighbour: by the rounding 10 above and 9 below
    assert found["part"] == {"attention": 7 * (10 + 9) * 64 * 2 * 4, "convolution": 56 * 400}


def test_posted_by_hand():
    """A picture of 16 x 24: what the layers of one of two strips post, from the shapes."""
    found = patchparallel.posted(NETWORK, PICTURES, 2)
    kinds = [category for category, _, _ in found]
    attention = [entry for entry in found if entry[0] == "attention"]
    assert attention == [("attention", 2 * 2 * 4 * 12 * 16, 48)] * len(attention)  # b, k and v, tokens, channels
    convolutions = [m for m in NETWORK.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert kinds.count("convolution") == len(convolutions) - 1  # the first one costs nothing
    assert kinds.count("normalisation") == sum(isinstance(m, nn.GroupNorm) for m in NETWORK.modules())
    assert found[-1] == ("output", 2 * 8 * 24, 0)
    assert ("convolution", 2 * 2 * 8 * 24, 0) in found  # two pictures, two rows, 8 channels, 24 wide
    assert {numbers for category, numbers, _ in found if category == "normalisation"} == {2 * 2 * 4}


# -- the network on a strip --------------------------------------------------------------------------------------------


def test_pictures_that_cannot_be_cut_are_refused(pcpp):
    with pytest.raises(ValueError, match=r"^16 rows cannot be cut into 16 strips: use a multiple of 32\.$"):
        patchparallel.check_strips(NETWORK, 16, 16)
    patchparallel.check_strips(NETWORK, 8, 16)
    with pytest.raises(ValueError, match="10 rows cannot be cut into 4 equal strips"):
        patchparallel.rows_of(1, 4, 10)
    with pytest.raises(ValueError, match="12 rows cannot be cut into 4 strips"):
        pcpp.InStrips(NETWORK, pcpp.Synchronous(EchoWire(0, 4)))(torch.zeros(1, 1, 12, 16), torch.tensor([1.0]))


def test_layers_that_a_strip_cannot_compute_are_refused():
    network = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
        downsample_padding=0, add_attention=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="only 3 × 3 with one row around it"):
        patchparallel.on_strip(network, Reader("all", 0, 2, 1), 0, 2)


def test_a_strip_shares_the_weights_and_leaves_the_network_alone(pcpp):
    before = steps(NETWORK)
    strip = patchparallel.on_strip(NETWORK, pcpp.Synchronous(EchoWire(0, 2)), 0, 2)
    assert all(a is b for a, b in zip(strip.parameters(), NETWORK.parameters(), strict=True))
    assert torch.equal(steps(NETWORK), before)


def test_a_negative_variance_is_replaced_by_ones_own():
    layer, x = nn.GroupNorm(2, 4), torch.randn(3, 4, 5, 6)
    lied = patchparallel._group_norm(layer, lambda own: torch.stack([own[0], own[0] ** 2 - 1]), x)
    torch.testing.assert_close(lied, layer(x))
    shifted = patchparallel._group_norm(layer, lambda own: torch.stack([own[0] + 1, own[1] + 2 * own[0] + 1]), x)
    torch.testing.assert_close(shifted, layer(x) - 1 / x.view(3, 2, -1).std(2, correction=0).repeat_interleave(2, 1)[
        ..., None, None], rtol=1e-4, atol=1e-4)  # fmt: skip


# -- wires -------------------------------------------------------------------------------------------------------------


def test_gathers_and_swaps_arrive_in_any_order_of_waiting():
    def talk(wire):
        first, second = (wire.gather(torch.full((2,), 10.0 * k + wire.rank), "x") for k in (1, 2))
        peers = [r for r in (wire.rank - 1, wire.rank + 1) if 0 <= r < wire.size]
        parcel = {peer: torch.full((wire.rank + 1,), float(peer)) for peer in peers}
        swap = wire.swap(parcel, {peer: peer + 1 for peer in peers}, "y")
        late, early = second.wait(), first.wait()
        return [t[0].item() for t in early + late], {p: t.tolist() for p, t in swap.wait().items()}, dict(wire.received)

    found = in_threads(3, talk)
    assert [values for values, _, _ in found] == [[10.0, 11.0, 12.0, 20.0, 21.0, 22.0]] * 3
    assert found[1][1] == {0: [1.0], 2: [1.0, 1.0, 1.0]}
    assert [received for _, _, received in found] == [{"x": 32, "y": 8}, {"x": 32, "y": 16}, {"x": 32, "y": 8}]


def test_a_board_gives_the_previous_step_and_counts_by_category():
    def post(wire):
        board, read = Board(wire, together=2), []
        board.keep("a", [torch.zeros(1)] * 2)
        for step in range(3):
            read.append([t.item() for t in board.read("a")])
            for name, size in (("a", 1), ("b", 3), ("c", 2)):
                board.post(name, torch.full((size,), 10.0 * step + wire.rank), name)
            board.flush()
        return read, [t.tolist() for t in board.read("c")], dict(wire.received), dict(wire.messages)

    read, last, received, messages = in_threads(2, post)[0]
    assert read == [[0.0, 0.0], [0.0, 1.0], [10.0, 11.0]]
    assert last == [[20.0, 20.0], [21.0, 21.0]]
    assert received == {"a": 12, "b": 36, "c": 24}
    assert messages == {"a": 3, "b": 3, "c": 3}


def test_mail_of_no_length_needs_no_message():
    def post(wire):
        mail = Mail(wire, "x", together=1)
        mail.post("a", {1 - wire.rank: torch.zeros(2, 0, 3)}, {1 - wire.rank: (2, 0, 3)})
        return mail.read("a")[1 - wire.rank].shape, wire.received["x"]

    assert in_threads(2, post) == [((2, 0, 3), 0)] * 2
    with pytest.raises(KeyError):
        Mail(EchoWire(0, 2), "x").read("never posted")


def test_an_echo_has_the_shapes_of_a_group(pcpp):
    for size, rank in ((2, 0), (4, 1), (8, 7)):
        model = pcpp.InStrips(NETWORK, pcpp.Partial(EchoWire(rank, size), warmup=0))
        assert steps(model).shape == (3, 2, 1, 16, 24)


def test_what_a_thread_raises_is_told_and_not_the_silence_of_the_others():
    def fail(wire):
        if wire.rank == 1:
            raise RuntimeError("the reason")
        wire.gather(torch.zeros(1), "x").wait()

    with pytest.raises(RuntimeError, match="the reason"):
        in_threads(2, fail, timeout=0.5)


def test_turns_are_timed_by_the_slowest_member():
    def turns(wire):
        calls = {"both": lambda: time.sleep(0.02 * wire.rank)} | ({"first": int} if wire.rank == 0 else {})
        return in_turn(wire, calls, ["both", "first"], repeats=3, warmup=1)

    table = slowest(in_threads(2, turns))
    assert list(table.columns) == ["name", "repeat", "seconds", "waiting"]
    assert sorted(zip(table.name, table.repeat, strict=True)) == [(n, r) for n in ("both", "first") for r in range(3)]
    assert table[table.name == "both"].seconds.min() >= 0.02


# -- processes ---------------------------------------------------------------------------------------------------------


def gone(pids, patience=10.0):
    """Whether all processes end within so many seconds."""
    deadline = time.monotonic() + patience
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc to look at")


@pytest.fixture(scope="module")
def pair():
    with fleet.Fleet(2) as workers:
        yield workers


@pytest.mark.parametrize("name", ["Synchronous", "Displaced", "Partial"])
def test_processes_compute_what_threads_compute(pcpp, pair, name):
    scheme = getattr(pcpp, name) if name == "Synchronous" else partial(getattr(pcpp, name), warmup=0)
    for (said, received, messages), expected in zip(pair.run(strips, pcpp, scheme), run(pcpp, 2, scheme), strict=True):
        assert apart(said, expected[0]) < 1e-5
        assert (received, messages) == expected[1:]


def test_workers_run_what_they_are_given_by_value(pair):
    factor = 3

    def times(wire, number):
        return factor * number + wire.rank, torch.get_num_threads()

    assert pair.run(times, 5) == [(15, 1), (16, 1)]


@needs_proc
def test_the_loopback_counter_sees_what_is_counted(pair):
    def send(wire, count):
        for _ in range(count):
            wire.gather(torch.zeros(50_000), "x").wait()
        return wire.received["x"]

    ratios = []
    for _ in range(3):  # others may use the interface, too: the least counts
        before = fleet.loopback_bytes()
        sent = sum(pair.run(send, 20))
        ratios.append((fleet.loopback_bytes() - before) / sent)
    assert sent == 2 * 20 * 200_000
    assert 1 <= min(ratios) < 1.1


def test_a_worker_that_raises_ends_all_in_one_line(tmp_path):
    def fail(wire):
        if wire.rank == 1:
            raise ValueError("no such\nthing")
        wire.gather(torch.zeros(1), "x").wait()

    workers = fleet.Fleet(2)
    pids = workers.pids
    with pytest.raises(fleet.FleetError) as error:
        workers.run(fail)
    assert str(error.value).startswith("worker 1 of 2 failed: ValueError: no such thing (line ")
    assert str(error.value).endswith("test_pcpp.py). All workers were ended.")
    assert gone(pids)
    with pytest.raises(fleet.FleetError, match="this fleet is closed"):
        workers.run(fail)


@needs_proc
@pytest.mark.parametrize("busy", ["computing", "waiting for a message"])
def test_a_worker_that_is_killed_ends_all_in_one_line(busy, tmp_path):
    def work(wire):
        if wire.rank == 1 or busy == "computing":
            time.sleep(60)
        wire.gather(torch.zeros(1), "x").wait()

    workers = fleet.Fleet(3)
    pids = workers.pids
    threading.Timer(0.3, os.kill, (pids[1], signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(fleet.FleetError, match=r"^worker 1 of 3 died [\w ]+ \(SIGKILL\)\. All workers were ended\.$"):
        workers.run(work)
    assert time.monotonic() - started < 10
    assert gone(pids)


def test_a_worker_that_was_killed_between_jobs_is_missed(tmp_path):
    workers = fleet.Fleet(2)
    os.kill(workers.pids[0], signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(fleet.FleetError, match=r"^worker 0 of 2 died .*\(SIGKILL\)"):
        workers.run(lambda wire: None)


@needs_proc
def test_ctrl_c_ends_the_workers(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        workers = fleet.Fleet(2)
        pids = workers.pids
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            workers.run(lambda wire: time.sleep(60))
    finally:
        signal.signal(signal.SIGINT, before)
    assert gone(pids)


PARENT = """
import time
from workbook import fleet
from workbook.fleet import Fleet
if __name__ == "__main__":
    fleet.PRELOAD = ["torch.distributed"]
    workers = Fleet(2)
    print(*workers.pids, flush=True)
    workers.run(lambda wire: time.sleep(60))
"""


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent(how, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    assert gone(pids)


def test_an_empty_fleet_is_refused():
    with pytest.raises(ValueError, match=r"^size = 0: a fleet has at least one worker\.$"):
        fleet.Fleet(0)


def test_a_plain_wire_counts_nothing_yet():
    assert summed([Wire(0, 2).received, {"x": 2}, {"x": 3, "y": 1}]) == {"x": 5, "y": 1}


# -- one wrong sign ----------------------------------------------------------------------------------------------------

MUTATIONS = [
    ("strips[rank - 1][1] if rank > 0", "strips[rank - 1][0] if rank > 0"),
    ("strips[rank + 1][0] if rank + 1", "strips[rank + 1][1] if rank + 1"),
    ('torch.stack(self.everyone(name, moments, "normalisation")).mean(0)', "moments"),
    ("self.step <= self.warmup", "self.step < self.warmup"),
    ("self.step += 1", "self.step += 2"),
    ("+ (moments - strips[self.wire.rank])", "- (moments - strips[self.wire.rank])"),
    ("strips[self.wire.rank] = own", "strips[self.wire.rank - 1] = own"),
    ("self.board.post(name, own, category)", "self.board.post(name, -own, category)"),
    ("tokens * (rank - share)", "tokens * (rank - share) + 1"),
    ("tokens * (rank + 1 + share)", "tokens * (rank + 1 - share)"),
    ("first - (rank - 1) * tokens", "first - rank * tokens"),
    ("slice(0, last - (rank + 1) * tokens)", "slice(1, last - (rank + 1) * tokens)"),
    ("parts(peer, size, tokens, self.share)[rank]", "parts(rank, size, tokens, self.share)[peer]"),
    ("if self.waits else moments", "if self.waits else 2 * moments"),
    ("torch.zeros_like(x[:, :, :1]),) * 2", "x[:, :, :1],) * 2"),
    ("packets = 2 * (size - 1)", "packets = 2 * size"),
]


def judges(method):
    """Checks of a method, the cheap ones first: for each the call that must not raise."""
    yield partial(test_windows_are_those_of_exact_fractions, method, 4, 64, "0.3")
    yield partial(test_bytes_by_hand, method)
    yield partial(test_the_warm_up_waits_for_steps_zero_to_warmup, method)
    yield from (partial(test_stale_steps_are_the_reference, method, 4, kind) for kind in ("part", "all", "alone"))
    yield partial(test_strips_that_wait_are_the_network, method, 2)


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    mutated = mutate(NAME, old, new, tmp_path, monkeypatch)
    assert any(map(fails, judges(mutated))), f"nothing noticed that {old!r} became {new!r}"


def test_the_judges_of_mutations_pass_what_is_right(pcpp):
    for check in judges(pcpp):
        check()
