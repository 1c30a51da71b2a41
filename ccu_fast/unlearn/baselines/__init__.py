"""The methods CCU is compared with: :mod:`ccu_fast.unlearn.baselines.registry` has them by name.

Those that start from the trained model run in :func:`ccu_fast.unlearn.loop.run` under the same budget as CCU unless the
registry says otherwise; retraining is in :mod:`ccu_fast.unlearn.study.train`. Each names its paper, its formula, the
settings of the paper and of its released code, and what is changed for two modalities. They know that the visual
modality is the one to forget, but, as published, have no term for another modality; ``keep_other`` gives them one.
"""
