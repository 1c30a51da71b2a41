"""MEM: publish image-caption pairs that teach a model less (Liu et al. 2024, arXiv 2407.16307)."""

from ccu_fast.mem.config import Execution, Method, Settings, strength
from ccu_fast.mem.job.job import Job
from ccu_fast.mem.job.models import choose_model
from ccu_fast.mem.job.protect import protect_dataset
from ccu_fast.mem.job.victims import evaluate_datasets
from ccu_fast.mem.protection import Protected, Protection, protect
from ccu_fast.mem.publish.memory import export
from ccu_fast.mem.retrieval import reading, retrieval
from ccu_fast.mem.study import run_digit_strips
from ccu_fast.mem.tokenizer import WordTokenizer
from ccu_fast.mem.verification import verify
from ccu_fast.mem.victim import Recipe, Victim, train_victim
from ccu_fast.models.tokenizer import Tokenizer

__all__ = [
    "Execution",
    "Job",
    "Method",
    "Protected",
    "Protection",
    "Recipe",
    "Settings",
    "Tokenizer",
    "Victim",
    "WordTokenizer",
    "choose_model",
    "evaluate_datasets",
    "export",
    "protect",
    "protect_dataset",
    "reading",
    "retrieval",
    "run_digit_strips",
    "strength",
    "train_victim",
    "verify",
]
