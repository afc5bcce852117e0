from captum_fusion.explain import Explainer


def test_the_bundled_network_sees_both_objects_of_the_sample() -> None:
    best = Explainer().open().prediction.top(2)
    assert {category for _, category, _ in best} == {"espresso", "Egyptian cat"}
    assert all(probability > 0.1 for *_, probability in best)
