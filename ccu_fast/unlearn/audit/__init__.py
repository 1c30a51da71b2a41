"""What a sceptical reader measures on an unlearned model, each figure to be compared with a retrained model's.

- ``whole``       all of it in one call: :func:`audit`
- ``membership``  attacks on the model alone: confidence, modified entropy
- ``lira``        the likelihood-ratio attack, calibrated on shadow models
- ``probe``       what a linear classifier finds in the frozen features
- ``relearn``     how many steps bring the knowledge back
- ``retrieval``   recall of pairs without labels
- ``summary``     average gap to retraining, time ratios, mean and spread over seeds
- ``maps``        embeddings in the plane
"""

from ccu_fast.unlearn.audit.lira import Shadows, lira_scores, train_shadows
from ccu_fast.unlearn.audit.maps import embedding_map
from ccu_fast.unlearn.audit.membership import auc, membership_auc, modified_entropy, tpr_at_fpr
from ccu_fast.unlearn.audit.probe import linear_probe
from ccu_fast.unlearn.audit.relearn import relearn_steps
from ccu_fast.unlearn.audit.retrieval import recall
from ccu_fast.unlearn.audit.summary import average_gap, mean_and_spread, most_accurate, over_seeds, time_ratios
from ccu_fast.unlearn.audit.whole import MODALITIES, audit

__all__ = [
    "MODALITIES",
    "Shadows",
    "auc",
    "audit",
    "average_gap",
    "embedding_map",
    "linear_probe",
    "lira_scores",
    "mean_and_spread",
    "membership_auc",
    "modified_entropy",
    "most_accurate",
    "over_seeds",
    "recall",
    "relearn_steps",
    "time_ratios",
    "tpr_at_fpr",
    "train_shadows",
]
