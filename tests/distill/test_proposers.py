import pytest
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
    OwlViTTextConfig,
    OwlViTVisionConfig,
    ResNetConfig,
)

from qzoom.data.crop import CropSettings
from qzoom.distill.items import ImageRef, Item, TargetRegion, apply
from qzoom.distill.pictures import ImageSource, Views, scan
from qzoom.distill.proposers import (
    DetectorSettings,
    GivenSettings,
    GridSettings,
    MapsSettings,
    ProposeSettings,
    SelectSettings,
    area_bin,
    crop_step,
    make_proposer,
    propose_step,
    select,
)
from qzoom.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def scene():
    picture, loaded = scan(ImageSource("scenes:5", "", "scenes"))
    views = Views()
    with views.working_on(picture, (), loaded):
        yield Item(picture), views, loaded.known


def test_boxes_of_questions_objects_and_tiles(scene):
    item, views, known = scene
    boxes = {one.box: one.phrase for one in make_proposer("given", ProposeSettings())(item, views)}
    assert {box for question in known.questions for box in question.boxes} <= set(boxes)
    thing = known.objects[0]
    assert boxes[thing.box] == f"{thing.colour} {thing.shape}"
    only = ProposeSettings(given=GivenSettings(questions=False))
    found = make_proposer("given", only)(item, views)
    assert [one.box for one in found] == list(dict.fromkeys(one.box for one in known.objects))
    item = Item(ImageRef("0" * 20, "x", 101, 59))
    tiles = make_proposer("grid", ProposeSettings(grid=GridSettings(3, 2)))(item, Views())
    assert len(tiles) == 6
    assert sum((b[2] - b[0]) * (b[3] - b[1]) for b in (tile.box for tile in tiles)) == 101 * 59
    assert tiles[-1].box[2:] == (101, 59)
    item = Item(ImageRef("0" * 20, "x", 300, 100))
    tiles = make_proposer("grid", ProposeSettings(grid=GridSettings(2, 1, overlap=0.5)))(item, Views())
    assert [tile.box for tile in tiles] == [(0, 0, 200, 100), (100, 0, 300, 100)]


def test_region_maps_of_the_embedded_model(scene):
    item, views, _ = scene
    settings = MapsSettings("tiny", questions=("What is the code on the tag?",), region_threshold=0.05, device="cpu")
    found = make_proposer("maps", ProposeSettings(by=("maps",), maps=settings))(item, views)
    width, height = item.picture.width, item.picture.height
    assert found
    assert all(0 <= b[0] < b[2] <= width and 0 <= b[1] < b[3] <= height for b in (one.box for one in found))
    assert all(0 < one.score <= 1 for one in found)


@pytest.fixture(scope="module")
def detr(tmp_path_factory):
    """A random DETR of a few thousand weights in a folder."""
    folder = tmp_path_factory.mktemp("detr")
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=5,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_labels=3,
    )
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


def test_detectors_name_boxes_with_their_classes(scene, detr, tmp_path):
    item, views, _ = scene
    settings = ProposeSettings(by=("detector",), detector=DetectorSettings(str(detr), threshold=0.0, device="cpu"))
    found = make_proposer("detector", settings)(item, views)
    assert len(found) == 5
    assert {one.phrase for one in found} <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert make_proposer("detector", settings)(item, views) == found
    item, views, _ = scene
    settings = ProposeSettings(by=("detector",), detector=DetectorSettings(str(tmp_path), device="cpu"))
    with pytest.raises(CheckpointError, match="cannot be loaded for object-detection"):
        apply("propose", propose_step(settings, views, 0), item)


def test_step_makes_items_with_seeds_of_their_own_and_refuses_empty_pictures(scene, tmp_path):
    item, views, known = scene
    made = apply("propose", propose_step(ProposeSettings(), views, 3), item)
    kept = [one for one in made if one.kept]
    assert 0 < len(kept) <= 8
    assert len({one.seed for one in kept}) == len(kept)
    other = apply("propose", propose_step(ProposeSettings(), views, 4), item)
    assert {one.seed for one in other}.isdisjoint({one.seed for one in made})
    Image.new("RGB", (300, 200)).save(tmp_path / "x.png")
    alone, _ = scan(ImageSource("x.png", str(tmp_path), "x"))
    (refused,) = apply("propose", propose_step(ProposeSettings(), views, 3), Item(alone))
    assert refused.decisions[-1].reason == "nothing proposed"


@pytest.fixture(scope="module")
def owlvit(tmp_path_factory):
    """A random OWL-ViT with a byte tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("owlvit")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [
        "!",
        "<|startoftext|>",
        "<|endoftext|>",
        *(letter for letter in letters if letter != "!"),
        *(f"{letter}</w>" for letter in letters),
    ]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", model_max_length=16)
    text = OwlViTTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = OwlViTVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
    )
    config = OwlViTConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    OwlViTForObjectDetection(config).save_pretrained(folder)
    OwlViTProcessor(OwlViTImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


def test_a_detector_that_takes_words_names_what_was_looked_for(scene, owlvit):
    item, views, _ = scene
    detector = DetectorSettings(str(owlvit), phrases=("red star", "tag"), threshold=0.0, device="cpu")
    found = make_proposer("detector", ProposeSettings(by=("detector",), detector=detector))(item, views)
    assert found
    assert {one.phrase for one in found} <= {"red star", "tag"}
    assert all(0 <= one.score <= 1 for one in found)
    target = TargetRegion((2000, 10, 2100, 50), (0, 0, 1, 1), "given")
    (item,) = apply("crop", crop_step(CropSettings()), Item(ImageRef("0" * 20, "x", 1000, 600), target))
    assert (item.kept, item.decisions[-1].reason) == (False, "the box lies outside the picture")


SIZE = (1000, 1000)


def reasons(boxes, scores=None, **settings):
    return [reason for _, _, reason in select(boxes, scores or [1.0] * len(boxes), SIZE, SelectSettings(**settings))]


def box(x, y, width, height):
    return x, y, x + width, y + height


def test_each_limit_has_its_reason():
    boxes = [
        box(0, 0, 100, 100),
        box(0, 0, 400, 400),
        box(500, 500, 2, 2),
        box(500, 500, 11, 200),
        box(500, 100, 20, 20),
        box(100, 700, 800, 20),
        box(1200, 0, 50, 50),
        box(950, 950, 100, 100),
    ]
    assert reasons(boxes, min_share=1e-5, max_share=0.1, min_side_px=12) == [
        "",
        "larger than the area band",
        "smaller than the area band",
        "too few pixels",
        "too few visual tokens",
        "too long and thin",
        "outside the picture",
        "",
    ]


def test_boxes_are_clipped_and_of_overlapping_ones_the_better_stays():
    ((clipped, _, reason),) = select([(950, -20, 1100, 60)], [1.0], SIZE, SelectSettings())
    assert (clipped, reason) == ((950, 0, 1000, 60), "")
    boxes = [box(0, 0, 100, 100), box(10, 0, 100, 100), box(60, 0, 100, 100)]
    assert reasons(boxes, [0.5, 0.9, 0.4]) == ["overlaps a better one", "", ""]
    assert reasons(boxes) == ["", "overlaps a better one", ""]


def test_bins_are_filled_in_turn_up_to_the_picture_s_share():
    small = [box(100 * n, 0, 30, 30) for n in range(5)]
    large = [box(300 * n, 300, 280, 280) for n in range(3)]
    found = reasons(small + large, min_share=5e-4, bins=2, per_bin=3, per_picture=4)
    assert found == [
        "",
        "",
        "enough of this picture",
        "enough of its size",
        "enough of its size",
        "",
        "",
        "enough of this picture",
    ]


def test_bins_have_equal_ratios_and_settings_are_checked():
    settings = SelectSettings(min_share=1e-4, max_share=1e-1, bins=3)
    sides = (10, 31, 32, 99, 101, 316)
    assert [area_bin(box(0, 0, side, side), SIZE, settings) for side in sides] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ConfigError, match="leaves no room"):
        SelectSettings(min_share=0.2, max_share=0.1)
    with pytest.raises(ConfigError, match="must be one of given, grid, maps, detector, not 'sam'"):
        ProposeSettings(by=("sam",))
    with pytest.raises(ConfigError, match=r"detector\.model is missing"):
        ProposeSettings(by=("detector",))
