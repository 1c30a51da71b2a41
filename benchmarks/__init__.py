"""Measurements of ccu_fast and its peers: one registry (op × shape × provider), one timer, one runner.

    python -m benchmarks --help

``registry`` says what an operation, a shape and a provider are; ``ops`` lists them; ``gate`` decides who may be timed;
``timer`` and ``memory`` measure; ``runner`` puts a case together; ``results``, ``tables``, ``plots`` and ``summary``
store and show it; ``bars`` holds the results against the figures the project owes. ``visit`` does everything that a
visit to a GPU is for, ``exercise`` calls our kernels on small shapes. FACTS.md says what was decided by measuring.
"""

import os

# A benchmark compiles one small graph at a time: a pool of compiler processes would cost more than it saves, and its
# threads must not be there when a measuring process is forked. Read by torch when inductor is imported.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
