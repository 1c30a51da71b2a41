"""Which library is tested in which version, and an environment for each."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Environment:
    """One library in one version.

    Attributes:
        target: a name of :func:`ccu_fast.patch.targets`; its tests are ``tests/patch/test_<target>*.py``.
        version: what is installed; for code that is not a package what the table calls it.
        packages: requirements in ``pip``'s words, installed with theirs.
        alone: requirements installed without theirs: those need torchvision or dozens of packages that are not used.
    """

    target: str
    version: str
    packages: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.target}-{self.version}"


_TEXTATTACK = (
    "lru-dict",
    "more-itertools",
    "nltk",
    "terminaltables",
    "word2number",
    "num2words",
    "editdistance",
    "lemminflect",
    "docopt",
    "click",
    "joblib",
    "tqdm",
    "regex",
)

# Before version 5 transformers has an older huggingface-hub, with which the kernels that the tests install does not
# import.
_TRANSFORMERS_4 = ("transformers==4.57.6", "kernels==0.9.0")
_LIGHTLY = ("tqdm", "requests", "python-dateutil", "pydantic", "aenum", "urllib3", "certifi", "six")
_CLAP = (
    *(*_TRANSFORMERS_4, "librosa", "soundfile", "torchlibrosa", "ftfy", "braceexpand", "webdataset", "wget"),
    *("scikit-learn", "pandas", "h5py", "tqdm", "regex", "pillow", "progressbar"),
)
# datasets of the time of transformers 4, which has an older huggingface-hub.
_FLAG = ("datasets==3.6.0", "peft", "sentencepiece", "ir-datasets")
# Version 4 is not released; its sources may lie on this machine.
_OPEN_CLIP_4 = os.environ.get("CCU_FAST_OPEN_CLIP") or (
    "git+https://github.com/mlfoundations/open_clip@89fb801f1e6087880e951fc8354b8a2077b79c6d"
)

ENVIRONMENTS = (
    Environment("open_clip", "2.24.0", ("ftfy", "regex", "tqdm", "huggingface-hub"), ("open_clip_torch==2.24.0",)),
    Environment("open_clip", "3.3.0", ("ftfy", "regex", "tqdm", "huggingface-hub"), ("open_clip_torch==3.3.0",)),
    Environment("open_clip", "4.2.0.dev0", ("ftfy", "regex", "tqdm", "huggingface-hub"), (_OPEN_CLIP_4,)),
    Environment("transformers", "4.57.6", _TRANSFORMERS_4),
    Environment("transformers", "5.24.0", ("transformers==5.24.0",)),
    Environment("sentence_transformers", "5.1.2", ("sentence-transformers==5.1.2", *_TRANSFORMERS_4)),
    Environment("sentence_transformers", "6.2.0", ("sentence-transformers[train]==6.2.0",)),
    Environment("pytorch_metric_learning", "2.3.0", ("pytorch-metric-learning==2.3.0",)),
    Environment("pytorch_metric_learning", "2.9.0", ("pytorch-metric-learning==2.9.0",)),
    # Of what lightly requires, which is much, its losses need torchvision alone, and that is stood in for.
    Environment("lightly", "1.5.20", _LIGHTLY, ("lightly==1.5.20", "lightly-utils")),
    Environment("lightly", "1.6.0", ("tqdm",), ("lightly==1.6.0",)),
    Environment("info_nce", "0.1.4", (), ("info-nce-pytorch==0.1.4",)),
    Environment(
        "colpali_engine", "0.3.18", ("transformers>=5.3", "peft", "pillow", "scipy"), ("colpali-engine==0.3.18",)
    ),
    # Its package imports what reads audio and tar files before it comes to its loss.
    Environment("laion_clap", "1.1.4", _CLAP, ("laion-clap==1.1.4",)),
    Environment("laion_clap", "1.1.7", _CLAP, ("laion-clap==1.1.7",)),
    # 1.3.2 asks for transformers 4.44.2, which needs numpy 1; of later ones it imports 4.46 at the most. 1.4.2 says
    # that it takes transformers 5, and does not import with it.
    Environment("flag_embedding", "1.3.2", ("transformers==4.46.3", *_FLAG), ("FlagEmbedding==1.3.2",)),
    Environment("flag_embedding", "1.4.2", (*_TRANSFORMERS_4, *_FLAG), ("FlagEmbedding==1.4.2",)),
    Environment("nanogcg", "0.2.3", ("nanogcg==0.2.3",)),
    Environment("nanogcg", "0.3.0", ("nanogcg==0.3.0",)),
    Environment("textattack", "0.3.10", ("requests", "pandas", "transformers"), ("textattack==0.3.10", *_TEXTATTACK)),
    Environment("textattack", "0.3.11", ("requests", "pandas", "transformers"), ("textattack==0.3.11", *_TEXTATTACK)),
    Environment("mem_reference", "authors' code" if os.environ.get("CCU_FAST_MEM_REFERENCE") else "transcription"),
)


def build(environment: Environment, root: Path) -> Path:
    """The interpreter of an environment in ``root``, made where it is not: the packages of this one shine through.

    Raises:
        subprocess.CalledProcessError: pip could not install what the environment needs.
    """
    folder = root / environment.name.replace("'", "").replace(" ", "-")
    python = folder / "bin" / "python"
    done = folder / "done"
    if done.exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # addsitedir, so that .pth files of this environment (an editable install) count there too, after its own packages.
    (Path(site) / "zz_parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    constraint = folder / "constraints.txt"
    constraint.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    if environment.packages:
        subprocess.run([*pip, "-c", str(constraint), *environment.packages], check=True, stdout=sys.stderr)
    if environment.alone:
        subprocess.run([*pip, "--no-deps", *environment.alone], check=True, stdout=sys.stderr)
    done.touch()
    return python
