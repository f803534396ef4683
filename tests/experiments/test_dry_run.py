"""Reports of --dry_run: sizes that are known from elsewhere, and what does not fit."""

import re

import programs
import pytest

from experiments.cli import dry_run
from roe_jax import params as params_lib
from roe_jax import presets, sharding
from roe_jax.roster import Roster

pytestmark = pytest.mark.slow

MIXTRAL = presets.PRESETS["mixtral-8x7b"]


def plan(config=MIXTRAL, members=16, **settings):
  return dry_run.Plan(
    config,
    Roster.create(config, members, 0.3),
    **(dict(batch_size=16, length=2048, accelerator="h100") | settings),
  )


def number(report, name, column=0):
  """The numbers behind the name of a line."""
  found = re.search(rf"^  {re.escape(name)} +(.*)$", report, re.M)
  return float(found[1].split()[column])


def test_memory_is_what_the_model_and_the_mesh_make_it():
  report = dry_run.report(plan(), sharding.abstract_mesh(MIXTRAL, 8, expert=2, tensor=4))
  experts = 32 * 8 * 3 * 4096 * 14336 * 2
  heads = 32 * (2 * 32 + 2 * 8) * 128 * 4096 * 2
  tables = 2 * 32000 * 4096 * 2
  whole = 32 * (8 * 4096 + 2 * 4096) * 2 + 4096 * 2
  assert params_lib.num_bytes(MIXTRAL) == experts + heads + tables + whole
  expected = (experts + tables) / 8 + heads / 4 + whole
  assert number(report, "weights") == pytest.approx(expected / 1e9, abs=1e-3)
  # Half of the texts, two of the eight heads; room for one token more.
  cache = 2 * 32 * 8 * 2 * 2560 * 128 * 2
  assert number(report, "KV cache") == pytest.approx(cache / 1e9, abs=1e-3)
  assert "fits: 72.0 GB usable (90 % of 80 GB)" in report


def test_a_roster_of_a_memory_bound_step_costs_little_more_than_one():
  """Sixteen sequences activate nearly all of eight experts with one member, too."""
  report = dry_run.report(plan(), sharding.abstract_mesh(MIXTRAL, 8, expert=8))
  assert number(report, "active experts of 8, at most", 1) > 7.8
  assert 1 < number(report, "time relative to n = 1") < 1.2
  # Reading half of 93.4 GB takes a step on two devices 13.9 ms at least.
  report = dry_run.report(plan(), sharding.abstract_mesh(MIXTRAL, 2, expert=2))
  assert 13.9 < number(report, "ms of reading") < 15


def test_drafts_and_sure_positions_are_compared_with_the_roster_and_the_baseline():
  roster = Roster.create(MIXTRAL, 16, 0.3, draft_tokens=4, unsure="margin<0.5")
  settings = dict(batch_size=1, length=2048, accelerator="h200", acceptance=0.5, unsure=0.0)
  report = dry_run.report(
    dry_run.Plan(MIXTRAL, roster, **settings), sharding.abstract_mesh(MIXTRAL, 1)
  )
  assert number(report, "tokens kept of 4") == 1 + 0.5 + 0.25 + 0.125
  passes = [number(report, "forward passes", i) for i in range(3)]
  assert passes == [round(4 / 1.875, 2), 16, 1]  # the clean member alone, and what was not kept
  times = [number(report, "ms per token", i) for i in range(3)]
  assert times[0] == pytest.approx(4 / 1.875 * times[2], rel=1e-3) and times[1] > times[2]
  assert number(report, "speedup of the roster") == pytest.approx(times[1] / times[0], abs=0.01)


def test_a_plain_model_has_one_column():
  report = dry_run.report(plan(members=1), sharding.abstract_mesh(MIXTRAL, 8))
  assert number(report, "time relative to n = 1") == 1
  assert "n = 1\n" in report and "n = 16" not in report


def test_what_does_not_fit_says_what_would():
  config = presets.PRESETS["qwen3-235b-a22b"]
  needs_more = plan(config, accelerator="a100-40")
  report = dry_run.report(needs_more, sharding.abstract_mesh(config, 4, expert=4))
  assert "DOES NOT FIT" in report
  devices, mesh = re.search(
    r"no 4-device mesh fits; with (\d+) devices: --mesh=(\S+),", report
  ).groups()
  sizes = {axis: int(size) for axis, _, size in (p.partition(":") for p in mesh.split(","))}
  fits = dry_run.report(needs_more, sharding.abstract_mesh(config, int(devices), **sizes))
  assert "  fits:" in fits and f"{devices}-device meshes that fit" in fits
  half = dry_run.report(needs_more, sharding.abstract_mesh(config, int(devices) // 2))
  assert "DOES NOT FIT" in half  # it was the least power of two
  huge = dry_run.report(
    plan(config, batch_size=2**20, accelerator="v5e"), sharding.abstract_mesh(config, 4)
  )
  assert "no mesh of up to 4096 v5e fits" in huge


def test_scoring_counts_its_chunks_and_the_pass_that_fills_the_cache():
  report = dry_run.report(plan(scoring=True), sharding.abstract_mesh(MIXTRAL, 8))
  assert "with clean prefill" in report and "prefilled prompts" not in report
  flops = [number(report, "GFLOPs per token, all devices", i) for i in (0, 1)]
  assert 16.5 < flops[0] / flops[1] < 17  # once more, without the head


def test_without_an_accelerator_there_are_no_times():
  report = dry_run.report(plan(accelerator=None), sharding.abstract_mesh(MIXTRAL, 8))
  assert "ms" not in report.split() and "fit" not in report


@pytest.mark.parametrize(
  "settings,sentence",
  [
    (dict(length=1), "--length must lie in"),
    (dict(length=40000), "--length must lie in"),
    (dict(overlap=1.5), "--overlap must lie in"),
    (dict(acceptance=-0.1), "--acceptance must lie in"),
    (dict(acceptance=0.9), "with --draft_tokens only: add that"),
    (dict(unsure=0.1), "--unsure_share applies to rosters with --unsure only: add it"),
  ],
)
def test_bad_settings_are_refused(settings, sentence):
  with pytest.raises(ValueError, match=sentence):
    plan(**settings)
  with pytest.raises(ValueError, match="remove --cache=none"):
    dry_run.Plan(MIXTRAL, Roster.create(MIXTRAL, 4, 0.3, cache="none"), 16, 64)


def run(program, *arguments):
  return programs.call(f"experiments.{program}", *arguments)


def test_the_programs_print_it_and_read_no_parameters():
  done = run(
    "generate",
    "--checkpoint=preset:mixtral-8x7b",
    "--dry_run",
    "--accelerator=h200",
    "--num_devices=64",
    "--mesh=auto",
    "--num_members=16",
    "--tau=0.2",
  )
  assert done.returncode == 0, done.errors
  assert "mesh     data:1,expert:8,tensor:8, 64 x h200" in done.output
  done = run("score", "--checkpoint=embedded:wordmath_control", "--dry_run", "--window=64")
  assert done.returncode == 0, done.errors
  assert "score 8 sequences of 64 tokens" in done.output and "1 x device" in done.output


@pytest.mark.parametrize(
  "arguments,sentence",
  [
    (["--checkpoint=preset:mixtral-8x7b", "--prompt=x"], "has sizes but no parameters"),
    (["--checkpoint=preset:mistral", "--dry_run"], "unknown preset 'mistral'; choose one of olmoe"),
    (
      ["--checkpoint=preset:mixtral-8x7b", "--dry_run", "--num_devices=64", "--mesh=tensor:16"],
      "tensor may be 1, 2, 4, 8",
    ),
  ],
)
def test_bad_flags_end_with_one_sentence(arguments, sentence):
  done = run("generate", *arguments)
  assert done.returncode == 1 and "Traceback" not in done.errors
  assert sentence in done.errors.strip().splitlines()[-1]
