"""Training that goes on to the bit, its numbers beside plain formulas, and files that are whole or not at all."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dfmath.integrations import checkpoints
from dfmath.integrations.batches import batches
from dfmath.integrations.training import TrainingPlan, train
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dfmath import GaussianMixture, PointMasses


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On a busy machine these small problems wait for more threads much longer than they compute."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


PLAN = TrainingPlan(steps=50, rate=0.01, warmup=5, weight_decay=0.1, averaging=0.9, seed=3, every=20)


def network(width=8):
    """With dropout, which draws from the global generator, and buffers that change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, width), nn.BatchNorm1d(width), nn.SiLU(), nn.Dropout(0.3), nn.Linear(width, 1)
        )


def regression(net, before=lambda step: None):
    """The loss of a linear function; `before` is told of every step."""

    def loss(step, generator):
        before(step)
        x = torch.randn(16, 3, generator=generator)
        return (net(x)[:, 0] - x @ torch.tensor([1.0, -2.0, 0.5])).square().mean()

    return loss


def stopping(at, what):
    """Raises, once, before a step is done."""
    left = [at]

    def before(step):
        if left and step == left[0]:
            left.clear()
            raise what

    return before


def run(path=None, before=lambda step: None, plan=PLAN, net=None, **options):
    net = network() if net is None else net
    result = train(net, regression(net, before), plan, checkpoint=path, **options)
    return net, result


def run_to_be_killed(path):
    """What the subprocess runs: a tenth of a second for each step."""
    torch.set_num_threads(1)
    run(path, lambda step: time.sleep(0.1))


def assert_same(one, other):
    """Two modules, or files, to the bit."""
    one, other = (x.state_dict() if isinstance(x, nn.Module) else checkpoints.load(x).tensors for x in (one, other))
    assert list(one) == list(other) or sorted(one) == sorted(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing interrupted: its module, its result, its file."""
    path = tmp_path_factory.mktemp("whole") / "run.safetensors"
    return *run(path), path


# The numbers


def test_learns_a_regression():
    net = nn.Linear(3, 1, bias=False)
    result = train(net, regression(net), TrainingPlan(steps=200, rate=0.1, warmup=10, averaging=0.95))
    torch.testing.assert_close(net.weight[0], torch.tensor([1.0, -2.0, 0.5]), rtol=0.0, atol=1e-3)
    assert result.steps == len(result.losses) == 200 and result.stopped is None and result.validations == ()
    assert result.losses[-1] < 1e-4 < result.losses[0]


def plain(weight, bias, data, plan):
    """AdamW (Loshchilov and Hutter 2019), a clipped gradient and averages, from the formulas."""
    values = [weight.clone(), bias.clone()]
    averages = [value.clone() for value in values]
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    for step, x in enumerate(data):
        off = x @ values[0].T + values[1] - 3.0 * x.sum(dim=1, keepdim=True)
        gradients = [2.0 * off.T @ x / len(x), 2.0 * off.mean(dim=0)]
        norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
        share = 1.0 if plan.clip is None else min(1.0, plan.clip / norm)
        late = (step - plan.warmup) / (plan.steps - plan.warmup)
        rate = plan.rate * ((step + 1) / plan.warmup if step < plan.warmup else (1.0 + math.cos(math.pi * late)) / 2.0)
        decay = min(plan.averaging, (1 + step) / (10 + step))
        for i, g in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * share * g
            second[i] = 0.999 * second[i] + 0.001 * (share * g) ** 2
            mean, square = first[i] / (1.0 - 0.9 ** (step + 1)), second[i] / (1.0 - 0.999 ** (step + 1))
            values[i] = (1.0 - rate * plan.weight_decay) * values[i] - rate * mean / (square.sqrt() + 1e-8)
            averages[i] = decay * averages[i] + (1.0 - decay) * values[i]
    return values, averages


@pytest.mark.parametrize(
    "change",
    [{}, {"clip": None}, {"warmup": 0}, {"weight_decay": 0.0}, {"averaging": 0.0}, {"averaging": 0.5}],
    ids=str,
)
def test_numbers_are_those_of_the_formulas(change, tmp_path):
    given = {"steps": 60, "rate": 0.03, "warmup": 7, "weight_decay": 0.2, "clip": 0.3, "averaging": 0.8} | change
    plan, net = TrainingPlan(**given), nn.Linear(2, 1).double()
    data = torch.from_numpy(np.random.default_rng(0).standard_normal((plan.steps, 10, 2)))
    values, averages = plain(net.weight.detach(), net.bias.detach(), data, plan)

    def loss(step, generator):
        return (net(data[step]) - 3.0 * data[step].sum(dim=1, keepdim=True)).square().mean()

    train(net, loss, plan, checkpoint=tmp_path / "run")
    held = checkpoints.load(tmp_path / "run").tensors
    for i, name in enumerate(("weight", "bias")):
        torch.testing.assert_close(held[f"raw.{name}"], values[i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(held[f"averaged.{name}"], averages[i], rtol=1e-6, atol=1e-6)
        assert torch.equal(net.get_parameter(name), held[f"averaged.{name}"])


@given(st.integers(2, 300), st.data())
def test_rates_rise_and_fall(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    plan = TrainingPlan(steps=steps, rate=0.5, warmup=warmup)
    rates = [plan.rate_at(step) for step in range(steps)]
    assert all(0.0 < rate <= 0.5 for rate in rates) and max(rates) == 0.5 == rates[warmup]
    assert np.all(np.diff(rates[:warmup]) > 0.0) and np.all(np.diff(rates[warmup:]) < 0.0)
    np.testing.assert_allclose(np.diff(rates[:warmup], n=2), 0.0, atol=1e-12)
    assert rates[-1] <= 0.5 * (math.pi / (steps - warmup)) ** 2 / 4.0 + 0.5 * (steps - warmup == 1)


def test_every_step_draws_numbers_of_its_own():
    net, seen = nn.Linear(1, 1), {}

    def loss(step, generator):
        seen[step] = (torch.rand((), generator=generator).item(), torch.rand(()).item())
        return net.weight.square().sum()

    train(net, loss, TrainingPlan(steps=30, seed=0))
    assert len({number for pair in seen.values() for number in pair}) == 60
    first = dict(seen)
    train(net, loss, TrainingPlan(steps=20, seed=0))
    assert seen == first  # whatever came before, and however many are to come
    train(net, loss, TrainingPlan(steps=30, seed=1))
    assert not {pair[0] for pair in seen.values()} & {pair[0] for pair in first.values()}


def test_averages_of_half_precision_are_kept_in_single(tmp_path):
    net = nn.Linear(3, 1).to(torch.bfloat16)
    loss = lambda step, generator: net(torch.ones(1, 3, dtype=torch.bfloat16)).sum()  # noqa: E731
    train(net, loss, TrainingPlan(steps=5), checkpoint=tmp_path / "run")
    held = checkpoints.load(tmp_path / "run").tensors
    assert held["averaged.weight"].dtype == torch.float32 and held["raw.weight"].dtype == torch.bfloat16
    assert torch.equal(net.weight, held["averaged.weight"].to(torch.bfloat16))


def test_validations_see_the_averages_and_change_nothing(whole, tmp_path):
    seen = []

    def validate(net):
        assert not any(part.training for part in net.modules())
        seen.append({name: p.detach().clone() for name, p in net.named_parameters()})
        torch.rand(100)
        return net[0].weight.mean()

    net, result = run(tmp_path / "run", validate=validate)
    assert [step for step, _ in result.validations] == [20, 40, 50]
    assert [value for _, value in result.validations] == [each["0.weight"].mean().item() for each in seen]
    assert all(torch.equal(p, seen[-1][name]) for name, p in net.named_parameters())
    assert_same(net, whole[0])
    assert result.losses == whole[1].losses


# Going on


@given(st.integers(0, PLAN.steps - 1), st.sampled_from([1, 7, 20, 100]), st.booleans())
@settings(max_examples=12)
def test_interrupted_trainings_end_with_the_same_bits(whole, tmp_path_factory, at, every, in_loss):
    """Stopped in any step, in its loss or behind it, and gone on in a new module from another start."""
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    plan = TrainingPlan(**{**PLAN.__dict__, "every": every})
    came = []

    def progress(text):
        came.append(text)
        if not in_loss and len(came) == at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, stopping(at, KeyboardInterrupt) if in_loss else lambda step: None, plan, progress=progress)
    assert len(checkpoints.load(path).tensors["losses"]) == at + (not in_loss)
    net, came = network(), []
    nn.init.zeros_(net[0].weight)
    net, result = run(path, plan=plan, net=net, progress=came.append)
    assert_same(net, whole[0])
    assert_same(path, whole[2])
    assert result.losses == whole[1].losses and result.steps == PLAN.steps and len(came) == PLAN.steps


def test_interrupts_do_not_tear_a_step(whole, tmp_path, monkeypatch):
    """A signal in the midst of the optimizer's work waits for its end."""
    plain_step, calls = torch.optim.AdamW.step, []

    def step(self, *args):
        calls.append(0)
        if len(calls) == 30:
            signal.raise_signal(signal.SIGINT)
        return plain_step(self, *args)

    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)
    assert len(checkpoints.load(tmp_path / "run").tensors["losses"]) == 30
    assert_same(run(tmp_path / "run")[0], whole[0])


def test_interrupted_validations_put_the_weights_back(whole, tmp_path):
    def validate(net):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", validate=validate)
    assert_same(run(tmp_path / "run")[0], whole[0])


def test_killed_trainings_end_with_the_same_bits(whole, tmp_path):
    """Another process is killed after its first checkpoint, in the midst of its run."""
    path, taken = tmp_path / "run.safetensors", []
    code = "import sys, test_training; test_training.run_to_be_killed(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment)
    try:
        deadline = time.monotonic() + 100.0
        while not path.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    held = len(checkpoints.load(path).tensors["losses"])
    assert held in (20, 40)
    net, result = run(path, taken.append)
    assert taken == list(range(held, PLAN.steps)) and result == whole[1]
    assert_same(net, whole[0])
    assert_same(path, whole[2])


def test_finished_trainings_are_loaded_and_not_repeated(whole):
    def never(step):
        raise AssertionError

    net, result = run(whole[2], never)
    assert_same(net, whole[0])
    assert result == whole[1]


def test_parameters_without_gradients_and_frozen_ones_stay(tmp_path):
    """Here the bias is frozen and the second layer is never used; both go through the file."""

    def make():
        torch.manual_seed(1)
        net = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
        net[0].bias.requires_grad_(False)
        return net

    results = []
    for at in (99, 13):
        net, first = make(), make()
        loss = lambda net, before: regression(net[0], before)  # noqa: E731
        path = tmp_path / f"run {at}"
        if at < 50:
            with pytest.raises(KeyboardInterrupt):
                train(net, loss(net, stopping(at, KeyboardInterrupt)), PLAN, checkpoint=path)
            net = make()
        train(net, loss(net, lambda step: None), PLAN, checkpoint=path)
        assert torch.equal(net[0].bias, first[0].bias) and not torch.equal(net[0].weight, first[0].weight)
        torch.testing.assert_close(net[1].weight, first[1].weight, rtol=1e-6, atol=0.0)
        results.append(net)
    assert_same(*results)


# Stopping


def diverging(kind, at):
    """Losses or gradients that are not finite from one step on."""

    def loss(net, step, generator):
        x = torch.randn(16, 3, generator=generator)
        found = net(x).square().mean()
        if step < at:
            return found
        if kind == "gradient":
            return found + (net[0].weight - net[0].weight.detach()).sqrt().sum()
        return found * (math.nan if kind == "nan" else math.inf)

    return loss


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize(("at", "good"), [(33, 20), (20, 20), (7, 0)])
def test_diverging_trainings_put_the_last_good_state_back(kind, at, good, tmp_path):
    net, start, other = network(), network(), network()
    loss = diverging(kind, at)
    result = train(net, lambda *given: loss(net, *given), PLAN, checkpoint=tmp_path / "run")
    assert result.steps == good and f"step {at}," in result.stopped and len(result.losses) == at + 1
    assert ("gradient" if kind == "gradient" else kind) in result.stopped
    assert all(math.isfinite(value) for value in result.losses[:at])
    if not good:
        assert_same(net, start)
        assert not (tmp_path / "run").exists()
        return

    def reference(step, generator):
        if step == good:
            raise KeyboardInterrupt
        return loss(other, step, generator)

    with pytest.raises(KeyboardInterrupt):
        train(other, reference, PLAN, checkpoint=tmp_path / "other")
    assert_same(tmp_path / "run", tmp_path / "other")
    held = checkpoints.load(tmp_path / "run").tensors
    assert all(torch.equal(p, held[f"averaged.{name}"]) for name, p in net.named_parameters())
    assert all(torch.equal(b, held[f"raw.{name}"]) for name, b in net.named_buffers())


def test_weights_that_overflow_are_not_kept(tmp_path):
    """The loss before the step does not show it."""
    net = nn.Linear(1, 1, bias=False)
    start = nn.init.constant_(net.weight, -3.3e38).detach().clone()
    plan = TrainingPlan(steps=3, rate=3e37, every=1)
    result = train(net, lambda step, generator: 1e-3 * net.weight.sum(), plan, checkpoint=tmp_path / "run")
    assert result.steps == 0 and "weights" in result.stopped and "step 0," in result.stopped
    assert len(result.losses) == 1 and torch.equal(net.weight, start) and not (tmp_path / "run").exists()


def test_everything_is_left_as_it_was_found():
    net, other = network(), nn.Linear(1, 1)
    net[3].eval()
    net[0].bias.requires_grad_(False)
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    before, loss = torch.get_rng_state(), regression(net, lambda step: seen.append(net[3].training))
    for at in (None, 7):
        seen = []
        if at is None:
            train(net, lambda *given: loss(*given) * (1.0 + other.weight.sum() ** 2), PLAN)
        else:
            with pytest.raises(ZeroDivisionError):
                run(None, stopping(at, ZeroDivisionError), net=net)
        assert torch.equal(torch.get_rng_state(), before)
        assert [m.training for m in net.modules()] == modes and all(seen)
        assert [p.requires_grad for p in net.parameters()] == flags
        assert all(p.grad is None for p in [*net.parameters(), *other.parameters()])


# Files


def write(path, version=None, config='{"width": 2}'):
    """A file with a format of its own."""
    save_file({"a": torch.ones(3)}, path, {"dfmath": f'{{"format": {version}, "config": {config}}}'})


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
SIMPLE = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    SIMPLE | st.text(max_size=5), lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part)
)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3))), st.data())
def test_files_give_back_what_they_were_given(tmp_path_factory, kinds, data):
    path, config = tmp_path_factory.mktemp("file") / "it", data.draw(st.dictionaries(st.text(max_size=3), VALUES))
    tensors = {f"{i}": (10.0 * torch.randn(shape)).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    tensors |= {f"{name} turned": tensor.mT for name, tensor in tensors.items() if tensor.ndim > 1}  # shares memory
    checkpoints.save(path, tensors, config)
    found = checkpoints.load(path)
    assert found.config == config and sorted(found.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)


def test_loaded_tensors_outlive_their_file(tmp_path):
    checkpoints.save(tmp_path / "it", {"a": torch.ones(1000)}, {})
    found = checkpoints.load(tmp_path / "it").tensors["a"]
    with (tmp_path / "it").open("r+b") as file:  # cut short, it would take the process down
        file.write(b"\0" * (tmp_path / "it").stat().st_size)
    assert found.sum() == 1000.0


def test_files_cut_short_anywhere_are_refused(tmp_path):
    checkpoints.save(tmp_path / "it", {"a": torch.ones(3), "b": torch.zeros(2)}, {"width": 2})
    content, path = (tmp_path / "it").read_bytes(), tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"'.*cut', which is damaged, cut short"):
            checkpoints.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.load(path)


def test_headers_that_begin_as_pickles_do(tmp_path):
    """Some headers are of a length whose first byte is 0x80: whole files are read, and cut ones are damaged."""
    path, starts = tmp_path / "it", set()
    for padding in range(0, 256, 8):  # headers are of a multiple of 8 bytes
        checkpoints.save(path, {"a": torch.ones(3)}, {"padding": "-" * padding})
        assert len(checkpoints.load(path).config["padding"]) == padding
        content = path.read_bytes()
        starts.add(content[:1])
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match="damaged"):
            checkpoints.load(path)
    assert b"\x80" in starts


@pytest.mark.parametrize("kind", ["zip", "legacy", *range(2, 6)])
def test_pickles_are_refused_by_name(kind, tmp_path):
    path = tmp_path / "it.pt"
    if isinstance(kind, int):
        path.write_bytes(pickle.dumps({"a": [1.0] * 20}, protocol=kind))
    else:
        torch.save(network().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"'.*it\.pt', a pickle; pickles are refused.*checkpoints\.save"):
        checkpoints.load(path)
    with pytest.raises(ValueError, match=r"^checkpoint: .*pickles are refused"):
        run(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "no regular file"),
        (lambda path: path.write_text("{}"), "of another kind"),
        (lambda path: save_file({"a": torch.ones(3)}, path), "safetensors file without its config"),
        (lambda path: write(path, 2), "format 1 or older, got '.*it' of format 2; a newer dfmath"),
        (lambda path: write(path, "[]"), "damaged"),
        (lambda path: write(path, 1, "[]"), "damaged"),
        (lambda path: write(path, 1, "{"), "damaged"),
    ],
)
def test_wrong_files_are_refused(make, words, tmp_path):
    make(tmp_path / "it")
    with pytest.raises(ValueError, match=words):
        checkpoints.load(tmp_path / "it")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"net": network(9)}, r"'.*run\.safetensors' must fit.*1\d of \d+ tensors differ, the first: 'raw\.0\.weight'"),
        ({"net": network()[:4]}, r"\.4\.\w+' is not the module's"),
        ({"net": nn.Sequential(*network(), nn.Linear(1, 1))}, r"'raw\.5\.weight' is missing"),
        ({"net": network().double()}, "has dtype torch.float32 where the module has torch.float64"),
        ({"plan": TrainingPlan(**{**PLAN.__dict__, "rate": 0.02})}, "plan.rate is 0.01 there and 0.02 here$"),
        ({"plan": TrainingPlan(**{**PLAN.__dict__, "clip": None, "seed": 4})}, "1.0 there and None here; plan.seed"),
        ({"config": {"data": None}}, "config.data is missing there and None here$"),
        ({"resume": False}, "would be overwritten"),
    ],
)
def test_checkpoints_of_other_trainings_are_refused(options, words, whole):
    content = whole[2].read_bytes()
    with pytest.raises(ValueError, match=words):
        run(whole[2], **options)
    assert whole[2].read_bytes() == content


def test_other_files_are_not_gone_on_from(tmp_path):
    checkpoints.save(tmp_path / "net", network().state_dict(), {"kind": "network"})
    with pytest.raises(ValueError, match="must be of a training"):
        run(tmp_path / "net")


def test_modules_take_weights_of_their_own_architecture():
    net, weights = network(), {name: tensor + 1 for name, tensor in network().state_dict().items()}
    checkpoints.load_into(net, weights, "it")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for change, words in (
        ({"0.bias": None}, "^it must fit.*one tensor differs: '0.bias' is missing$"),
        ({"6.bias": torch.ones(1), "0.bias": None}, "2 of 10 tensors differ, the first: '0.bias' is missing"),
        ({"6.bias": torch.ones(1)}, "'6.bias' is not the module's"),
        ({"0.bias": torch.ones(9)}, r"'0.bias' has shape \(9,\) where the module has \(8,\)"),
    ):
        wrong = {name: 2 * tensor for name, tensor in ({**weights, **change}).items() if tensor is not None}
        with pytest.raises(ValueError, match=words):
            checkpoints.load_into(net, wrong, "it")
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "dfmath.integrations.checkpoints.save_file"])
def test_failed_writes_leave_the_old_file_whole(where, tmp_path, monkeypatch):
    path = tmp_path / "it"
    checkpoints.save(path, {"a": torch.ones(3)}, {})
    content = path.read_bytes()

    def fail(*args):
        if where.endswith("save_file"):
            args[1].write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(path, {"a": torch.zeros(3)}, {})
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["it"]


def test_files_are_replaced_behind_links_and_open_to_others(tmp_path):
    (tmp_path / "other").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    checkpoints.save(tmp_path / "link", {"a": torch.ones(3)}, {})
    assert (tmp_path / "link").is_symlink() and checkpoints.load(tmp_path / "other").tensors["a"].sum() == 3.0
    (tmp_path / "plain").write_text("")
    checkpoints.save(tmp_path / "new", {}, {})
    modes = {name: (tmp_path / name).stat().st_mode for name in ("other", "new", "plain")}
    assert len(set(modes.values())) == 1, modes
    (tmp_path / "new").chmod(0o600)
    checkpoints.save(tmp_path / "new", {}, {})
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"path": 3}, TypeError, "path must be the name"),
        ({"path": "."}, ValueError, "folder"),
        ({"path": "nowhere/at/all/it"}, ValueError, "make its folder first"),
        ({"config": {"a": math.nan}}, TypeError, "JSON"),
        ({"config": {"a": (1, 2)}}, TypeError, "lists for tuples"),
        ({"config": {1: 2}}, TypeError, "strings as names"),
        ({"config": {"a": object()}}, TypeError, "JSON can hold"),
        ({"config": [1]}, TypeError, "dictionary"),
        ({"tensors": {"a": np.ones(3)}}, TypeError, "numpy.ndarray.*for 'a'"),
        ({"tensors": {"a": torch.ones(3, device="meta")}}, TypeError, "for 'a'"),
        ({"tensors": {"a": torch.eye(3).to_sparse()}}, TypeError, "for 'a'"),
    ],
)
def test_what_files_cannot_hold_is_refused(given, kind, words, tmp_path):
    given = {"path": tmp_path / "it", "tensors": {}, "config": {}} | given
    with pytest.raises(kind, match=words):
        checkpoints.save(**given)
    assert os.listdir(tmp_path) == []


# Batches


class Noisy(Dataset):
    """Its items draw from the global generator, as random crops do."""

    def __len__(self):
        return 23

    def __getitem__(self, i):
        return torch.tensor([float(i), torch.rand(()).item()])


def drawn(source, steps):
    return [source(step, torch.Generator().manual_seed(step)) for step in steps]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_are_wound_to_the_right_batch(workers):
    make = lambda: batches(DataLoader(Noisy(), 5, shuffle=True, num_workers=workers), seed=4)  # noqa: E731
    before, straight = torch.get_rng_state(), drawn(make(), range(17))
    assert torch.equal(torch.get_rng_state(), before)
    for epoch in range(3):
        rows = torch.cat(straight[5 * epoch : 5 * epoch + 5])
        assert sorted(rows[:, 0].tolist()) == list(range(23))
    assert not torch.equal(straight[0], straight[5]) and not torch.equal(straight[0][:, 0], straight[5][:, 0])
    for first in (0, 4, 13) if workers else range(17):
        torch.manual_seed(first)
        for found, wanted in zip(drawn(make(), range(first, 17)), straight[first:], strict=True):
            assert torch.equal(found, wanted)
    source = make()
    for step in (3, 3, 11, 2, 10) if workers == 0 else (3, 3, 2):
        assert torch.equal(*drawn(source, [step]), straight[step])
    other = batches(DataLoader(Noisy(), 5, shuffle=True, num_workers=workers), seed=5)
    assert not torch.equal(*drawn(other, [0]), straight[0])


def test_trainings_on_loaders_end_with_the_same_bits(tmp_path):
    def attempt(before, path):
        net, source = network(), batches(DataLoader(Noisy(), 5, shuffle=True))

        def loss(step, generator):
            before(step)
            x = source(step, generator)
            return (net(torch.cat([x, x[:, 1:]], dim=1))[:, 0] - x[:, 0]).square().mean()

        return net, train(net, loss, PLAN, checkpoint=path)

    wanted = attempt(lambda step: None, None)
    with pytest.raises(KeyboardInterrupt):
        attempt(stopping(33, KeyboardInterrupt), tmp_path / "run")
    found = attempt(lambda step: None, tmp_path / "run")
    assert_same(found[0], wanted[0])
    assert found[1].losses == wanted[1].losses


def test_rows_are_drawn_evenly_and_priors_are_sampled():
    data = torch.arange(10.0)[:, None]
    found = torch.cat(drawn(batches(data, 50), range(40)))
    counts = torch.bincount(found[:, 0].long(), minlength=10)
    assert found.shape == (2000, 1) and (counts - 200).abs().max() < 5.0 * math.sqrt(180.0)
    prior = GaussianMixture(torch.tensor([[0.0, 1.0], [4.0, 5.0]]), 0.01)
    one, two, again = drawn(batches(prior, 7), (0, 1, 0))
    assert one.shape == (7, 2) and one.dtype == torch.float32
    assert torch.equal(one, again) and not torch.equal(one, two)
    masses = torch.cat(drawn(batches(PointMasses(data), 50), range(40)))
    assert set(masses[:, 0].tolist()) == set(range(10))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(torch.ones(3, 1))


class Short(Endless):
    def __len__(self):
        return 6


LOADED = TensorDataset(torch.ones(6, 1))


@pytest.mark.parametrize(
    ("data", "options", "kind", "words"),
    [
        (3, {"size": 1}, TypeError, "data must be an instance"),
        (torch.ones(2, 2), {}, ValueError, "size must be a positive integer, got NoneType"),
        (torch.ones(2, 2), {"size": 0}, ValueError, "size"),
        (torch.ones(2, 2), {"size": 1, "seed": 0}, ValueError, "seed is for a DataLoader"),
        (torch.ones(()), {"size": 1}, ValueError, "at least one row"),
        (torch.ones(0, 2), {"size": 1}, ValueError, "at least one row"),
        (PointMasses(np.ones((2, 2))), {"size": 1}, TypeError, "torch components"),
        (DataLoader(LOADED), {"size": 1}, ValueError, "size is not for a DataLoader"),
        (DataLoader(LOADED), {"seed": -1}, ValueError, "seed"),
        (DataLoader(LOADED, 7, drop_last=True), {}, ValueError, "at least one batch"),
        (DataLoader(Endless()), {}, TypeError, "known length"),
        (DataLoader(LOADED, generator=torch.Generator()), {}, ValueError, "generator of its own"),
        (DataLoader(LOADED, num_workers=1, persistent_workers=True), {}, ValueError, "persistent_workers"),
    ],
)
def test_wrong_data_is_refused(data, options, kind, words):
    with pytest.raises(kind, match=words):
        batches(data, **options)


def test_loaders_that_end_early_are_refused():
    source = batches(DataLoader(Short()))
    with pytest.raises(ValueError, match=r"6 batches.*fewer at step 3"):
        drawn(source, range(6))


# What is asked for


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps must be a positive integer"),
        ({"every": 0}, "every must be a positive integer"),
        ({"rate": 0.0}, "rate must be positive and finite, got 0"),
        ({"rate": math.inf}, "rate must be positive"),
        ({"warmup": 50}, "warmup .* below 50, got int 50"),
        ({"weight_decay": -1.0}, "weight_decay must be zero or positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"averaging": 1.0}, "averaging must be in"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_plans_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        TrainingPlan(**{**PLAN.__dict__, **change})


def test_plans_hold_plain_numbers():
    plan = TrainingPlan(steps=np.int64(5), rate=np.float32(0.5), warmup=np.int32(2), clip=np.float64(1.0))
    assert TrainingPlan(**json.loads(json.dumps(plan.__dict__))) == plan


FROZEN = nn.Linear(1, 1).requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"module": 3}, TypeError, "module must be"),
        ({"module": FROZEN}, ValueError, "requires grad, got none"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"plan": 3}, TypeError, "plan must be"),
        ({"loss": lambda step, generator: 1.0}, TypeError, r"shape \(\), got float 1.0"),
        ({"loss": lambda step, generator: torch.ones(2, requires_grad=True)}, TypeError, r"shape \(\)"),
        ({"loss": lambda step, generator: torch.ones(())}, ValueError, "a constant"),
        ({"loss": lambda step, generator: torch.ones((), requires_grad=True) ** 2}, ValueError, "depends on none"),
        ({"validate": lambda net: "good"}, TypeError, "what validate returns"),
        ({"checkpoint": "nowhere/at/all/it"}, ValueError, "checkpoint: .*make its folder first"),
        ({"checkpoint": "."}, ValueError, "checkpoint: .*folder"),
        ({"checkpoint": "it", "config": {"a": {1, 2}}}, TypeError, "config"),
    ],
)
def test_wrong_arguments_are_refused(options, kind, words):
    net = nn.Linear(3, 1)
    given = {"module": net, "loss": regression(net), "plan": TrainingPlan(steps=2)} | options
    with pytest.raises(kind, match=words):
        train(given.pop("module"), given.pop("loss"), given.pop("plan"), **given)
