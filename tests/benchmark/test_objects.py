"""The ImageNet classes that name the categories of COCO and VOC."""

from itertools import chain

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights

from captum_fusion._app.models.classifier import imagenet_categories
from captum_fusion.benchmark._sources import imagenet_classes

COCO = [name for name in FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"][1:] if name != "N/A"]
VOC = FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]
# No class names these alone.
WITHOUT = """
    person, fire hydrant, stop sign, giraffe, suitcase, frisbee, snowboard, kite, baseball bat, baseball glove,
    skateboard, surfboard, wine glass, fork, carrot, donut, cake, potted plant, toilet, oven, scissors, toothbrush
"""


def test_every_category_of_coco_and_voc_is_there_and_each_class_names_one() -> None:
    classes = imagenet_classes()
    assert classes.keys() == {*COCO, *VOC}
    assert [name for name in COCO if not classes[name]] == [name.strip() for name in WITHOUT.split(",")]
    indices = list(chain.from_iterable(classes[name] for name in COCO))
    assert len(indices) == len(set(indices))
    assert all(0 <= index < 1000 for index in indices)


def test_classes_by_their_names() -> None:
    for category, names in [
        ("dog", ["Chihuahua", "golden retriever", "Mexican hairless"]),
        ("bird", ["cock", "great grey owl", "black grouse", "black swan", "white stork", "albatross"]),
        ("cat", ["tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"]),
        ("bear", ["brown bear", "American black bear", "ice bear", "sloth bear"]),
        ("aeroplane", ["airliner", "warplane"]),
        ("tvmonitor", ["monitor", "television"]),
        ("sofa", ["studio couch"]),
        ("motorbike", ["moped", "motor scooter"]),
    ]:
        assert {imagenet_categories().index(name) for name in names} <= set(imagenet_classes()[category])


def test_no_class_is_of_something_else_with_the_categorys_name() -> None:
    named = {imagenet_categories()[index] for index in chain.from_iterable(imagenet_classes().values())}
    # A carpenter's tool, part of a car, what a dog wears, wild dogs, large cats, and a dish.
    assert not named & {"plane", "car wheel", "muzzle", "dingo", "timber wolf", "lynx", "tiger", "hot pot"}
    # Every class that COCO itself has a word for by the same name.
    assert {name for name in imagenet_categories() if name in COCO} <= named
    # But for the kite, which is a bird there and a toy here.
    assert imagenet_categories().index("kite") in imagenet_classes()["bird"]
