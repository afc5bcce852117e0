"""Which of ImageNet's classes name the objects of COCO and VOC."""

from collections.abc import Iterable

# The ImageNet classes of which every instance is an instance of the COCO category; found by reading the 1000 names.
# Left out are classes that are wider than a category (street sign), a part of it (car wheel, toilet seat), something
# with it (horse cart), or that COCO's annotators file here or there (ambulance, goblet, stove, water buffalo).
# A person has none: groom, ballplayer and scuba diver name a role, and nearly no person has it.
IMAGENET_CLASSES: dict[str, tuple[int, ...]] = {
    "person": (),
    "bicycle": (444, 671),  # bicycle-built-for-two, mountain bike
    "car": (436, 468, 511, 609, 627, 656, 661, 751, 817),  # beach wagon, cab, convertible ... sports car
    "motorcycle": (665, 670),  # moped, motor scooter
    "airplane": (404, 895),  # airliner, warplane
    "bus": (654, 779, 874),  # minibus, school bus, trolleybus
    "train": (466, 547, 565, 705, 820, 829),  # bullet train, locomotives, freight and passenger car, streetcar
    "truck": (555, 569, 675, 717, 864, 867),  # fire engine, garbage truck, moving van, pickup, tow and trailer truck
    "boat": (403, 472, 484, 510, 554, 576, 625, 628, 724, 780, 814, 871, 914),  # aircraft carrier, canoe ... yawl
    "traffic light": (920,),
    "fire hydrant": (),
    "stop sign": (),
    "parking meter": (704,),
    "bench": (703,),  # park bench
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),  # cock ... great grey owl, black grouse ... albatross
    "cat": (281, 282, 283, 284, 285),  # tabby ... Egyptian cat
    "dog": tuple(range(151, 269)),  # Chihuahua ... Mexican hairless
    "horse": (339,),  # sorrel
    "sheep": (348, 349),  # ram, bighorn
    "cow": (345,),  # ox
    "elephant": (101, 385, 386),  # tusker, Indian and African elephant
    "bear": (294, 295, 296, 297),  # brown, American black, ice and sloth bear
    "zebra": (340,),
    "giraffe": (),
    "backpack": (414,),
    "umbrella": (879,),
    "handbag": (748,),  # purse
    "tie": (451, 457, 906),  # bolo, bow and Windsor tie
    "suitcase": (),
    "frisbee": (),
    "skis": (795,),
    "snowboard": (),
    "sports ball": (429, 430, 522, 574, 722, 768, 805, 852, 890),  # baseball ... volleyball
    "kite": (),
    "baseball bat": (),
    "baseball glove": (),
    "skateboard": (),
    "surfboard": (),
    "tennis racket": (752,),  # racket
    "bottle": (440, 720, 737, 898, 907),  # beer, pill, pop, water and wine bottle
    "wine glass": (),
    "cup": (504, 968),  # coffee mug, cup
    "fork": (),
    "knife": (499,),  # cleaver
    "spoon": (910,),  # wooden spoon
    "bowl": (659, 809),  # mixing and soup bowl
    "banana": (954,),
    "apple": (948,),  # Granny Smith
    "sandwich": (933,),  # cheeseburger
    "orange": (950,),
    "broccoli": (937,),
    "carrot": (),
    "hot dog": (934,),
    "pizza": (963,),
    "donut": (),
    "cake": (),
    "chair": (423, 559, 765, 857),  # barber, folding and rocking chair, throne
    "couch": (831,),  # studio couch
    "potted plant": (),
    "bed": (564,),  # four-poster
    "dining table": (532,),
    "toilet": (),
    "tv": (664, 851),  # monitor, television
    "laptop": (620, 681),  # laptop, notebook
    "mouse": (673,),
    "remote": (761,),  # remote control
    "keyboard": (508,),  # computer keyboard
    "cell phone": (487,),  # cellular telephone
    "microwave": (651,),
    "oven": (),
    "toaster": (859,),
    "sink": (896,),  # washbasin
    "refrigerator": (760,),
    "book": (917,),  # comic book
    "clock": (409, 530, 892),  # analog, digital and wall clock
    "vase": (883,),
    "scissors": (),
    "teddy bear": (850,),
    "hair drier": (589,),  # hand blower
    "toothbrush": (),
}
# VOC's names where COCO has another one.
_OF_VOC = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_BY_NAME = IMAGENET_CLASSES | {voc: IMAGENET_CLASSES[coco] for voc, coco in _OF_VOC.items()}


def imagenet_classes(categories: Iterable[str]) -> list[tuple[int, ...]] | None:
    """For each category of COCO or VOC the ImageNet classes that name it, if any; None if one is no such category."""
    names = list(categories)
    return [_BY_NAME[name] for name in names] if all(name in _BY_NAME for name in names) else None
