"""Deep feature factorization: scikit-learn's updates, and the concepts of pictures that are made of known ones."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_fusion import LayerFeatureFactorization
from captum_fusion.functional import non_negative_factors
from tests.conftest import SmallNet

pytestmark = pytest.mark.every_device

# Three kinds of pixels, of which each has a channel of its own and shares another one.
VECTORS = torch.tensor([[6.0, 0.0, 0.0, 1.0], [0.0, 3.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
KINDS = torch.tensor([[[0, 0, 1], [0, 0, 1], [0, 2, 2]], [[2, 2, 2], [1, 1, 1], [0, 0, 0]]])


class Parts(nn.Module):
    """The layer gives the channels of the input, and the head is a linear one of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.fc = nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).flatten(2).mean(2))


@pytest.fixture
def pictures(device: torch.device) -> Tensor:
    return VECTORS[KINDS].movedim(-1, 1).to(device)


def test_the_updates_are_scikit_learns() -> None:
    from sklearn.decomposition import NMF

    values = torch.rand(30, 8).double() * torch.rand(8).double()
    left, right = (part.numpy() for part in non_negative_factors(values, 3, iterations=0, seed=1))
    theirs = NMF(3, init="custom", solver="mu", max_iter=50, tol=0)
    expected = theirs.fit_transform(values.numpy(), W=left.copy(), H=right.copy())
    ours = non_negative_factors(values, 3, iterations=50, seed=1)
    np.testing.assert_allclose(ours[0], expected, rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs.components_, rtol=1e-6)


def test_no_step_increases_the_error() -> None:
    values = torch.rand(20, 6).relu()
    values[3], values[:, 2] = 0, 0
    errors = [
        (values - left @ right).norm().item()
        for left, right in (non_negative_factors(values, 2, iterations=steps) for steps in range(40))
    ]
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(errors))
    assert all(np.isfinite(errors))


def test_pictures_made_of_three_kinds_of_pixels(pictures: Tensor) -> None:
    model = Parts().to(pictures.device)
    state = torch.get_rng_state()
    maps, vectors, scores = LayerFeatureFactorization(model, model.layer, head=model.fc).attribute(
        pictures, concepts=3, iterations=2000
    )
    assert torch.equal(torch.get_rng_state(), state)
    expected = nn.functional.one_hot(KINDS, 3).movedim(-1, 1).float().to(maps)
    # The kinds are sorted by their part of the activations: the first one's is the largest.
    torch.testing.assert_close(maps, expected, atol=0.02, rtol=0)
    torch.testing.assert_close(vectors.cpu(), VECTORS, atol=0.05, rtol=0)
    assert scores is not None
    assert scores.argmax(dim=1).tolist() == [0, 1, 2]


def test_pytorch_grad_cam_finds_the_same_concepts(pictures: Tensor) -> None:
    from pytorch_grad_cam.feature_factorization.deep_feature_factorization import DeepFeatureFactorization

    # Without the channel that all kinds share: of that it first takes away the minimum.
    pictures = pictures.cpu() * torch.tensor([1, 1, 1, 0]).reshape(4, 1, 1)
    model = Parts()
    theirs, maps, outputs = DeepFeatureFactorization(model, model.layer, computation_on_concepts=model.fc)(
        pictures.clone(), n_components=3
    )
    ours = LayerFeatureFactorization(model, model.layer, head=model.fc)
    ours_maps, ours_vectors, ours_scores = ours.attribute(pictures, concepts=3, iterations=2000)
    assert ours_scores is not None
    for concept in range(3):
        cosines = torch.cosine_similarity(torch.from_numpy(theirs.T).float(), ours_vectors[concept], dim=1)
        match = int(cosines.argmax())
        assert cosines[match] > 0.99
        assert outputs[match].argmax() == ours_scores[concept].argmax()
        for example in range(2):
            torch.testing.assert_close(
                torch.tensor(maps[example][match]), ours_maps[example, concept], atol=0.05, rtol=0
            )


def test_shapes_seeds_and_outputs_of_any_form() -> None:
    for axes in [1, 2, 3]:
        model = SmallNet(axes).eval()
        images = torch.randn(2, 3, *(9, 6, 7)[:axes])
        factorization = LayerFeatureFactorization(lambda x, model=model: {"logits": model(x)}, model.features)
        first = factorization.attribute(images, concepts=3)
        size = model.features(model.stem(images)).shape[2:]
        assert (first.maps.shape, first.vectors.shape, first.scores) == ((2, 3, *size), (3, 6), None)
        assert first.maps.amin() >= 0
        torch.testing.assert_close(first.maps.transpose(0, 1).flatten(1).amax(dim=1), torch.ones(3))
        again = factorization.attribute(images, concepts=3)
        assert torch.equal(again.maps, first.maps)
        assert not torch.equal(factorization.attribute(images, concepts=3, seed=1).maps, first.maps)


def test_refuses(net: SmallNet, images: Tensor) -> None:
    for options, message in [
        ({"concepts": 0}, "concepts is 0; expected at least 1"),
        ({"iterations": 0}, "iterations is 0; expected at"),
    ]:
        with pytest.raises(ValueError, match=message):
            LayerFeatureFactorization(net, net.features).attribute(images, **options)


def test_refuses_a_layer_without_positive_values(net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight.zero_()
        net.features.bias.fill_(-1)
    with pytest.raises(ValueError, match="No activation of the layer is positive"):
        LayerFeatureFactorization(net, net.features).attribute(images)
