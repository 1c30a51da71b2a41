"""Measurements of ccu_fast and its peers: one registry (op × shape × provider), one timer, one runner.

    python -m benchmarks --help

``registry`` says what an operation, a shape and a provider are; ``ops`` lists them; ``gate`` decides who may be timed;
``timer`` and ``memory`` measure; ``runner`` puts a case together; ``results`` and ``tables`` store and show it;
``bars`` holds the results against the figures the project owes.
"""

import os

# A benchmark compiles one small graph at a time: a pool of compiler processes would cost more than it saves, and its
# threads must not be there when a measuring process is forked. Read by torch when inductor is imported.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
