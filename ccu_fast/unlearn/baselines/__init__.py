"""The methods CCU is compared with, one file each.

Those that start from the trained model run in :func:`ccu_fast.unlearn.loop.run` under the same budget as CCU (60 Adam
steps, learning rate 1e-3, batches of 128) unless :mod:`ccu_fast.unlearn.baselines.registry` says otherwise. Each file
names its paper, its formula, the defaults of the paper and of its released code, and what is changed for two
modalities. They know that the visual modality is the one to forget, but, as published, have no term for another
modality; ``keep_other`` gives them one.
"""
