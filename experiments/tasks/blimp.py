"""BLiMP: which of two sentences is grammatical (Warstadt et al. 2020, arXiv 1912.00582).

67 paradigms of minimal pairs. The answer is the sentence with the larger total log-probability
after a beginning-of-text token, with a space before it as in the tasks `blimp_...` of
lm-evaluation-harness. Pairs take turns between paradigms, so that the first examples have equally
many of each. The data have one split: a fixed slice of it is for validation.
"""

from collections.abc import Iterator
import itertools

from experiments.tasks import base, task_data
from experiments.tasks.task_data import Row, Source

NAME = base.TEXT + "blimp"
SLICE = 0.1
PARADIGMS = (
  "adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive "
  "animate_subject_trans causative complex_NP_island "
  "coordinate_structure_constraint_complex_left_branch "
  "coordinate_structure_constraint_object_extraction determiner_noun_agreement_1 "
  "determiner_noun_agreement_2 determiner_noun_agreement_irregular_1 "
  "determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2 "
  "determiner_noun_agreement_with_adj_irregular_1 determiner_noun_agreement_with_adj_irregular_2 "
  "determiner_noun_agreement_with_adjective_1 distractor_agreement_relational_noun "
  "distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1 ellipsis_n_bar_2 "
  "existential_there_object_raising existential_there_quantifiers_1 "
  "existential_there_quantifiers_2 existential_there_subject_raising expletive_it_object_raising "
  "inchoative intransitive irregular_past_participle_adjectives irregular_past_participle_verbs "
  "irregular_plural_subject_verb_agreement_1 irregular_plural_subject_verb_agreement_2 "
  "left_branch_island_echo_question left_branch_island_simple_question "
  "matrix_question_npi_licensor_present npi_present_1 npi_present_2 only_npi_licensor_present "
  "only_npi_scope passive_1 passive_2 principle_A_c_command principle_A_case_1 "
  "principle_A_case_2 principle_A_domain_1 principle_A_domain_2 principle_A_domain_3 "
  "principle_A_reconstruction regular_plural_subject_verb_agreement_1 "
  "regular_plural_subject_verb_agreement_2 sentential_negation_npi_licensor_present "
  "sentential_negation_npi_scope sentential_subject_island superlative_quantifiers_1 "
  "superlative_quantifiers_2 "
  "tough_vs_raising_1 tough_vs_raising_2 transitive wh_island wh_questions_object_gap "
  "wh_questions_subject_gap wh_questions_subject_gap_long_distance wh_vs_that_no_gap "
  "wh_vs_that_no_gap_long_distance wh_vs_that_with_gap wh_vs_that_with_gap_long_distance"
).split()
_SOURCE = Source(
  "blimp",
  ("blimp/data/*.jsonl", "blimp/*.jsonl", "blimp.jsonl"),
  tuple({"path": "nyu-mll/blimp", "name": name, "split": "train"} for name in PARADIGMS),
)


def _pair(row: Row) -> tuple[str, tuple[str, str]]:
  return row["UID"], (" " + row["sentence_good"], " " + row["sentence_bad"])


def _read(split, data_dir, chat) -> Iterator[base.Example]:
  if chat:
    raise ValueError(f"task {NAME} has no chat form: remove --chat")
  paradigms: dict[str, list[base.Example]] = {}
  for paradigm, pair in task_data.parse(_SOURCE.rows(data_dir), _pair, NAME):
    some = paradigms.setdefault(paradigm, [])
    some.append(base.Example(f"blimp/{paradigm}/{len(some)}", prompt="", choices=pair, target=0))
  for turn in itertools.zip_longest(*paradigms.values()):
    for example in filter(None, turn):
      inside = task_data.in_slice(task_data.content("".join(example.choices or ())), SLICE)
      if split == "all" or inside == (split == "validation"):
        yield example


BLIMP = base.Task(
  name=NAME,
  category="language",
  metric="acc",
  read=_read,
  judge=base.each(base.chosen),
  validation=f"a fixed slice ({100 * SLICE:.0f} %) of all pairs, selected by their words",
)
