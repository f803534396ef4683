"""Merged fine-tunes: closed forms, a reference one weight at a time, checkpoints, and refusals."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest
from test_convert import run
import test_roster
import tiny

from checkpoints_convert import merge_checkpoints
from experiments.cli import app
import roe_jax
from roe_jax import checkpoint, merging, scoring
from roe_jax.roster import Roster

CONFIG = tiny.config("olmoe")
BF16 = np.dtype(ml_dtypes.bfloat16)


def fine_tunes(count, dtype=np.float32):
  """A base and changes of unequal size, as nested lists of two arrays."""
  random = np.random.RandomState(0)
  base = random.standard_normal((6, 20)).astype(dtype)
  return base, [
    (base + np.float32(0.1 * (i + 1)) * random.standard_normal(base.shape)).astype(dtype)
    for i in range(count)
  ]


def by_weight(base, tasks):
  """Unified vector, masks and the paper's scales, one weight at a time in float64."""
  base = np.asarray(base, np.float64)
  changes = np.array([np.asarray(t, np.float64) - base for t in tasks])
  unified, masks = np.zeros_like(base), np.zeros(changes.shape, bool)
  for index in np.ndindex(base.shape):
    own = changes[(slice(None), *index)]
    sign = np.sign(own.sum())
    unified[index] = sign * max([abs(t) for t in own if t * sign > 0], default=0)
    masks[(slice(None), *index)] = own * unified[index] > 0
  scales = [abs(t).sum() / abs(m * unified).sum() for t, m in zip(changes, masks)]
  best = [(t * m * unified).sum() / np.square(m * unified).sum() for t, m in zip(changes, masks)]
  return unified, masks, scales, best


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
def test_a_merge_is_that_of_the_definition(dtype):
  base, tasks = fine_tunes(3, dtype)
  unified, masks, sums = merging.merge(base, tasks)
  expected, expected_masks, scales, best = by_weight(base, tasks)
  np.testing.assert_allclose(unified, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(masks, expected_masks)
  np.testing.assert_allclose([merging.SCALES["sums"](s) for s in sums], scales, rtol=1e-5)
  np.testing.assert_allclose([merging.SCALES["means"](s) for s in sums], scales, rtol=1e-5)
  np.testing.assert_allclose([merging.SCALES["least_squares"](s) for s in sums], best, rtol=1e-5)
  for task, mask in zip(tasks, masks):  # a mask alone never increases the distance
    change = np.asarray(task, np.float64) - np.asarray(base, np.float64)
    assert np.linalg.norm(change - mask * unified) <= np.linalg.norm(change - unified)


def rebuilt(base, tasks, kind):
  """The tasks' arrays from what a merge stores."""
  stored, sums = merging.merge_piece({"w": base}, [{"w": t} for t in tasks], False)
  scales = [merging.SCALES[kind](s) for s in sums]
  return [merging.rebuild({"w": base}, stored, i, s)["w"] for i, s in enumerate(scales)], scales


@pytest.mark.parametrize("kind", merging.SCALES)
def test_one_task_and_tasks_of_disjoint_support_are_exact(kind):
  base, (task,) = fine_tunes(1, BF16)
  (found,), scales = rebuilt(base, [task], kind)
  # As exact as bfloat16: the vector is rounded to the dtype of the base.
  change = np.abs(np.asarray(task, np.float32) - np.asarray(base, np.float32))
  error = np.abs(np.asarray(found, np.float32) - np.asarray(task, np.float32))
  assert np.all(error <= 2.0**-7 * change) and scales == [pytest.approx(1)]
  base, tasks = fine_tunes(2)
  support = np.random.RandomState(1).random(base.shape) < 0.5
  tasks = [np.where(support, tasks[0], base), np.where(support, base, tasks[1])]
  found, scales = rebuilt(base, tasks, kind)
  np.testing.assert_allclose(found, tasks, rtol=1e-6, atol=1e-6)
  assert scales == [pytest.approx(1)] * 2


def test_tasks_that_cancel_out_leave_the_base():
  base = np.ones(8, np.float32)
  found, _ = rebuilt(base, [base + 1, base - 1], "sums")
  np.testing.assert_array_equal(found, [base, base])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A base and two fine-tunes of it, in pieces of different sizes."""
  folder, found = tmp_path_factory.mktemp("merging"), []
  for seed, name in enumerate(("base", "a", "b")):
    params = tiny.params(CONFIG)
    changed = jax.tree.map(lambda w, d: w + 0.1 * seed * d, params, tiny.params(CONFIG, seed=seed))
    checkpoint.save(folder / name, changed, CONFIG, piece_bytes=1 if name != "b" else 2**28)
    found.append(folder / name)
  return found


def leaves(path, **options):
  params, _ = checkpoint.load(path, **options)
  return {n: np.asarray(a) for n, a in checkpoint.named_leaves(params).items()}


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_a_merged_checkpoint_rebuilds_each_task(tmp_path, capsys, folders):
  base, *tasks = folders
  code, out, errors = run(
    capsys, merge=",".join(map(str, tasks)), base=base, target=tmp_path / "merged"
  )
  assert (code, errors) == (0, [])
  sizes = [
    int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes; separately ([\d,]+)", out)[0]
  ]
  whole = sum(a.nbytes for a in leaves(base).values())
  assert (
    sizes[1] == 2 * whole and sizes[0] > 2 * whole
  )  # with two tasks, masks cost more than they save
  own, originals = leaves(base), [leaves(task) for task in tasks]
  names = [n for n in own if ".router" not in n]
  flat = lambda arrays: np.concatenate([arrays[n].ravel() for n in names])
  unified, masks, scales, _ = by_weight(flat(own), [flat(o) for o in originals])
  for i, original in enumerate(originals):
    found = leaves(tmp_path / "merged", task=i)
    expected = flat(own) + scales[i] * masks[i] * unified
    np.testing.assert_allclose(flat(found), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["layers.router"], original["layers.router"])
    unscaled = leaves(tmp_path / "merged", task=str(tasks[i]), scale="one")
    np.testing.assert_allclose(flat(unscaled), flat(own) + masks[i] * unified, rtol=1e-4, atol=1e-5)
  assert all(np.array_equal(a, own[n]) for n, a in leaves(tmp_path / "merged").items())
  for options, message in (
    (dict(task=2), r"no task 2 in .*choose one of 0 \("),
    (dict(task=0, scale="best"), "unknown scale 'best'; choose one of sums, means"),
  ):
    with pytest.raises(ValueError, match=message):
      checkpoint.load(tmp_path / "merged", **options)
  with pytest.raises(ValueError, match="has no tasks: merge some"):
    checkpoint.load(base, task=0)
  damaged = tmp_path / "merged" / merging.FOLDER / "top.npz"
  damaged.write_bytes(damaged.read_bytes()[:-9])
  with pytest.raises(ValueError, match="is damaged: merge the tasks again"):
    checkpoint.load(tmp_path / "merged", task=0)


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_members_of_a_roster_compute_with_the_weights_of_tasks(tmp_path, folders):
  base, *tasks = folders
  merge_checkpoints.convert([str(t) for t in tasks], str(base), str(tmp_path / "merged"))
  params, config = roe_jax.model_formats.load_params(f"{tmp_path}/merged#all")
  for i, task in enumerate(tasks):
    expected = leaves(tmp_path / "merged", task=i)
    found = checkpoint.named_leaves(merging.params_of_task(params, i))
    assert found.keys() == expected.keys()
    for name in found:
      np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-7)
    by_name = roe_jax.model_formats.load_params(f"{tmp_path}/merged#{task}")[0]
    np.testing.assert_array_equal(by_name.embedding, expected["embedding"])
  # Three noisy members with the weights of tasks 1, 0, 1, on the base's Clean Cache.
  roster = Roster.create(config, 4, [0.0, 0.8, 0.4], seed=9, member_tasks="1-0-1")
  assert roster.noisy_layers == (0, 3)
  model = config, params
  expected = test_roster.by_definition(model, roster)
  assert np.abs(expected[0] - expected[1]).max() > 0.05 * np.abs(expected).max()
  test_roster.assert_close(test_roster.logits(model, roster), expected)
  averaged = np.log(np.mean(np.asarray(jax.nn.softmax(expected.astype(np.float32))), axis=0))
  targets = np.asarray(test_roster.TOKENS)[:, 1:, None]
  wanted = np.take_along_axis(averaged[:, :-1], targets, axis=-1)[..., 0]
  ids = test_roster.REQUESTS.tolist()
  for unsure in (None, "margin<2"):  # all positions, and members where they are needed
    each = roster.replace(unsure=unsure)
    found = scoring.score(params, config, test_roster.TOKENS.tolist(), roster=each, request_ids=ids)
    np.testing.assert_allclose([s.log_probs[:, 0] for s in found.sequences], wanted, atol=1e-4)
  # As stored on CPUs in bfloat16: after one token, a member sees nothing that the base wrote.
  pairs = test_roster.TOKENS[:, :2].tolist()
  params, config = app.load_params(f"{tmp_path}/merged#all", "bfloat16")
  one = Roster.create(config, 1, 0.0, include_clean=False, member_tasks=1)
  of_task = merging.params_of_task(params, 1)
  found, expected = (
    scoring.score(p, config, pairs, roster=r).sequences for p, r in ((params, one), (of_task, None))
  )
  for x, y in zip(found, expected):
    np.testing.assert_allclose(x.log_probs, y.log_probs, atol=1e-3)
  own = app.load_params(f"{tmp_path}/merged#1", "bfloat16")[0].embedding
  np.testing.assert_allclose(
    np.asarray(of_task.embedding, np.float32), np.asarray(own, np.float32), rtol=2**-7, atol=1e-3
  )
  with pytest.raises(ValueError, match="task 2, and the parameters have 2 tasks"):
    test_roster.logits(model, roster.replace(member_tasks=2))
  with pytest.raises(ValueError, match="member_tasks must be an integer of at least 0, or one for"):
    roster.replace(member_tasks="0-1")
  with pytest.raises(ValueError, match="no task 'c' in .*choose one of 0"):
    roe_jax.load_config(f"{tmp_path}/merged#c")


def test_an_interrupted_merge_resumes(tmp_path, capsys, monkeypatch, folders):
  base, *tasks = folders
  arguments = dict(merge=",".join(map(str, tasks)), base=base, merge_routers=True)
  write, written = checkpoint.Writer.write, []

  def dying_write(self, piece, arrays):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(piece.name)
    write(self, piece, arrays)

  monkeypatch.setattr(checkpoint.Writer, "write", dying_write)
  with pytest.raises(KeyboardInterrupt):
    run(capsys, **arguments, target=tmp_path / "one")
  monkeypatch.setattr(checkpoint.Writer, "write", write)
  for name in ("one", "other"):
    assert run(capsys, **arguments, target=tmp_path / name)[0] == 0
  one, other = (leaves(tmp_path / name, task=1) for name in ("one", "other"))
  assert all(np.array_equal(a, other[n]) for n, a in one.items())
  router = leaves(tasks[1])["layers.router"]
  assert not np.array_equal(one["layers.router"], router)  # routers are merged, too


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(merge="A,B"), "--merge needs --base"),
    (dict(base="A"), "--base applies to --merge only"),
    (
      dict(merge="A,B", base="A", quantize_experts="int8"),
      "--merge and --quantize_experts exclude",
    ),
    (dict(), "--source is missing"),
  ],
)
def test_flags_that_do_not_go_together(tmp_path, capsys, arguments, message):
  code, _, errors = run(capsys, target=tmp_path / "x", **arguments)
  assert code == 1 and re.search(message, errors[0]), errors


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_models_of_other_sizes_are_refused(tmp_path, capsys, folders):
  other = CONFIG.replace(context_length=47)
  checkpoint.save(tmp_path / "other", tiny.params(other), other)
  code, _, errors = run(
    capsys, merge=tmp_path / "other", base=folders[0], target=tmp_path / "x", dry_run=True
  )
  assert code == 1 and "only fine-tunes of the base can be merged" in errors[0]
