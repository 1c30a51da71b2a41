"""What a sceptical reader measures on an unlearned model, each figure to be compared with a retrained model's.

- ``whole``       all of it in one call: :func:`audit`
- ``membership``  attacks on the model alone: confidence, modified entropy
- ``probe``       what a linear classifier finds in the frozen features, and a map of them in the plane
- ``relearn``     how many steps bring the knowledge back
- ``retrieval``   recall of pairs without labels
- ``summary``     average gap to retraining, mean and spread over seeds
- ``text_membership``  membership inference that shows the model no picture; ``gibberish``, what it compares with;
  ``text_questions``, what a run or a comparison asks
"""

from ccu_fast.unlearn.audit.audit import audit
from ccu_fast.unlearn.audit.gibberish import gibberish_captions, gibberish_of
from ccu_fast.unlearn.audit.membership import auc, membership_auc, modified_entropy
from ccu_fast.unlearn.audit.probe import embedding_map, linear_probe
from ccu_fast.unlearn.audit.relearn import relearn_steps
from ccu_fast.unlearn.audit.retrieval import recall
from ccu_fast.unlearn.audit.summary import MODALITIES, average_gap, gaps, mean_figures, over_seeds, worst_gap
from ccu_fast.unlearn.audit.text_membership import TextMembership, text_features, text_membership, told_apart
from ccu_fast.unlearn.audit.verdict import Verdict, verdict, verdict_without_gold

__all__ = [
    "MODALITIES",
    "TextMembership",
    "Verdict",
    "auc",
    "audit",
    "average_gap",
    "embedding_map",
    "gaps",
    "gibberish_captions",
    "gibberish_of",
    "linear_probe",
    "mean_figures",
    "membership_auc",
    "modified_entropy",
    "over_seeds",
    "recall",
    "relearn_steps",
    "text_features",
    "text_membership",
    "told_apart",
    "verdict",
    "verdict_without_gold",
    "worst_gap",
]
