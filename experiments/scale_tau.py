"""Writes a temperature profile with one τ in units of the routers' own scale.

  python -m experiments.scale_tau --checkpoint=olmoe --text=corpus.txt --unit=margin --tau=2 \\
      --output=results/margin.json
  python -m experiments.generate --checkpoint=olmoe --tau=results/margin.json --num_members=8 \\
      --prompt=...

Router logits have another scale in each layer and model, so that one τ in logits changes many
choices in one layer and none in another. `spread` is the standard deviation of a token's router
logits over experts, and `margin` the difference between the last logit that is chosen and the
first that is not; both are means over the tokens of --text, or of the references of --task.
"""

import pathlib

from absl import flags

from checkpoints_convert import outputs
from experiments import tasks
from experiments.cli import app, text_files
from experiments.cli.extras import tabulate
from experiments.evaluation.requests import TaskRequests
from roe_jax import diagnostics, temperature_profiles
from roe_jax.temperature_profiles import Profile

FLAGS = flags.FLAGS
SPLIT = "validation"


def define_flags() -> None:
  app.define_model_flags()
  app.define_chat_flags()
  app.define_limit_flag()
  flags.DEFINE_enum("unit", "margin", diagnostics.UNITS, "Unit of --tau.")
  flags.DEFINE_float("tau", None, "τ of all layers, in this unit.", lower_bound=0.0)
  flags.DEFINE_string("text", None, "Text file that scales are measured on.")
  flags.DEFINE_string("task", "wordmath", "Task whose references they are measured on otherwise.")
  flags.DEFINE_string("data_dir", "data", "Folder of the tasks' data.")
  flags.DEFINE_integer(
    "num_examples", 64, "Examples, or windows of the text, at most.", lower_bound=1
  )
  flags.DEFINE_integer("batch_size", 16, "Sequences per batch.", lower_bound=1)
  flags.DEFINE_string("output", "results/scaled_tau.json", "The profile.")


def main(argv) -> None:
  del argv
  if FLAGS.tau is None:
    raise ValueError("--tau is missing: give τ in the unit of --unit")
  config = app.load_config(FLAGS.checkpoint)
  builder = app.request_builder(config, app.load_tokenizer(FLAGS.checkpoint))
  if FLAGS.text is not None:
    text = app.from_first_process(lambda: text_files.read(FLAGS.text))
    requests = builder.windows(text)
  else:
    task = tasks.get(FLAGS.task)
    examples = app.in_all_processes(
      lambda: task.examples(SPLIT, FLAGS.data_dir, FLAGS.num_examples, FLAGS.chat)
    )
    requests = TaskRequests.of(builder, task, examples, num_samples=0).all_references
  requests = requests[: FLAGS.num_examples]
  if not requests:
    raise ValueError("there is no text to measure on: the task has no references")
  params, config = app.load_params(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)
  scales = diagnostics.router_scales(
    params,
    config,
    [r.sequence for r in requests],
    [len(r.context) for r in requests],
    FLAGS.batch_size,
  )
  chosen = scales[FLAGS.unit]
  profile = Profile(
    tuple(float(FLAGS.tau * scale) for scale in chosen),
    temperature_profiles.model_of(FLAGS.checkpoint, config, params),
    data={"text": FLAGS.text}
    if FLAGS.text is not None
    else {"task": FLAGS.task, "split": SPLIT, "data_dir": FLAGS.data_dir},
    units={"unit": FLAGS.unit, "tau": FLAGS.tau, "scales": chosen.tolist()},
  )
  app.write_atomically(pathlib.Path(FLAGS.output), profile.to_json())
  rows = zip(range(config.num_layers), scales["spread"], scales["margin"], profile.temperatures)
  if app.is_first_process():
    headers = ["layer", "spread", "margin", "τ in logits"]
    print(tabulate.tabulate(list(rows), headers, floatfmt=("d", ".4g", ".4g", ".4g")))
    print(f"Saved {FLAGS.output}: give --tau={FLAGS.output} to other programs.")


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, needs=("tabulate",), output=outputs.FILE)


if __name__ == "__main__":
  program()
