"""Where retraining would put the forgotten items: among the retained ones that look like them."""

from __future__ import annotations

from torch import Tensor

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.bad_teacher import reinitialised
from ccu_fast.unlearn.loop import embed_visual, nearest
from ccu_fast.unlearn.model import TwoModalityModel


def neighbour_loss(u: Tensor, neighbours: Tensor) -> Tensor:
    """Draw each embedding to forget towards the retained item it resembles::

        mean_i( 1 - u_i . neighbours_i.detach() )

    An inverse loss alone leaves the forgotten items as a cluster of their own, which a linear probe finds. A model
    that never saw them has them where their inputs look like retained ones.

    Args:
        u: ``[N, D]`` live visual unit vectors of the forget batch; the only argument that gets a gradient.
        neighbours: ``[N, D]`` live visual unit vectors of a retained item for each, in the same order: those of
            :func:`nearest_retained`.

    Returns:
        Scalar in [0, 2], of the dtype of u; 0 for no rows.

    Raises:
        ValueError: neighbours is not shaped like u.

    Source: this project's definition (see :mod:`ccu_fast.unlearn.objective`).

    >>> ccu_fast.unlearn.neighbour_loss(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor(0.5000)
    """
    check.tensor("u", u, ndim=2)
    check.tensor("neighbours", neighbours)
    check.shape("neighbours", neighbours, u.shape)
    return (1 - (u * neighbours.detach()).sum(-1)).sum() / max(len(u), 1)


def nearest_retained(model: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Tensor:
    """For each item to forget the retained item that looks most like it to a network that has learned nothing::

        fresh = reinitialised(model, seed)
        (fresh.embed_visual(forget.visual) @ fresh.embed_visual(retain.visual).T).argmax(1)

    Nearness is measured before any training because the trained model's is what must go.

    Args:
        model: not changed; its architecture is what matters. Parameters outside of layers with a ``reset_parameters``
            stay as they were trained.
        forget, retain: on the device of the model.
        seed: of the fresh weights.

    Returns:
        int64 ``[len(forget)]``, rows of ``retain``.

    Raises:
        ValueError: no layer can be initialised anew.
    """
    fresh = reinitialised(model, seed)
    return nearest(embed_visual(fresh, forget.visual), embed_visual(fresh, retain.visual))
