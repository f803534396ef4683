"""The always-available task: word problems generated here, see `wordmath`."""

import dataclasses

from experiments.tasks import base, wordmath

COUNT = 1000  # examples of each split; any number could be generated


def _read(split, data_dir, chat):
  del data_dir  # nothing is read
  for i, problem in enumerate(wordmath.problems(split, COUNT)):
    prompt = wordmath.prompt(problem)
    yield base.Example(
        id=f"wordmath/{split}/{i}", prompt=prompt, target=problem.result, max_new_tokens=96,
        reference=wordmath.completion(problem),
        messages=({"role": "user", "content": problem.question},) if chat else (),
        data=dataclasses.asdict(problem))


def _score(example, output):
  return {"exact_match": float(wordmath.extract(output) == example.target)}


WORDMATH = base.Task(
    name="wordmath", category="math", metric="exact_match", read=_read, judge=base.each(_score),
    validation=f"the first {COUNT} generated problems of the split of that name, whose arithmetic "
               "occurs neither in training nor in the test problems")
