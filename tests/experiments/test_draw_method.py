"""The picture of the method: true to what it shows, and legible."""

import itertools

import matplotlib.pyplot as plt
import numpy as np

from experiments import draw_method


def test_noise_changes_what_each_member_but_the_clean_one_chooses():
  chosen = [
    draw_method.largest(np.add(draw_method.SCORES, noise), draw_method.NUM_CHOSEN)
    for noise in draw_method.NOISE
  ]
  assert not any(draw_method.NOISE[0]) and chosen[0] == {1, 4}
  assert all(c != chosen[0] and len(c) == draw_method.NUM_CHOSEN for c in chosen[1:])


def test_members_have_distributions_that_do_not_all_agree():
  p = np.array(draw_method.PROBABILITIES)
  assert p.shape == (len(draw_method.MEMBERS), len(draw_method.WORDS))
  np.testing.assert_allclose(p.sum(axis=1), 1)
  assert len(set(p.argmax(axis=1))) > 1


def test_words_lie_within_the_picture_and_over_nothing_else():
  figure = draw_method.draw()
  figure.canvas.draw()
  boxes = {t.get_text(): t.get_window_extent() for t in figure.axes[0].texts}
  assert len(boxes) >= len(draw_method.MEMBERS) + len(draw_method.WORDS)
  for text, box in boxes.items():
    assert figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max), text
  for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
    assert not a.overlaps(b), (one, other)
  bars = [patch for patch in figure.axes[0].patches if isinstance(patch, plt.Rectangle)]
  for (text, a), bar in itertools.product(boxes.items(), bars):
    assert not a.overlaps(bar.get_window_extent()), text
  plt.close(figure)
