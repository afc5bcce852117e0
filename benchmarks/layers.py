"""Lists the layer that last_feature_map chooses for a small member of each family of timm, with random weights.

python -m benchmarks.layers --output benchmarks/results/layers.md
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import timm
import torch

from captum_fusion import last_feature_map

FAMILIES = """
beit_base_patch16_224 beit3_base_patch16_224 beitv2_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224
coat_lite_tiny coat_tiny coatnet_pico_rw_224 coatnext_nano_rw_224 convformer_s18 convit_tiny convmixer_768_32
convnext_atto convnextv2_atto cpubone_nano crossvit_9_240 cs3darknet_focus_s cs3darknet_s csatv2 cspdarknet53
cspnext_tiny cspresnet50 darknet17 davit_tiny deit_tiny_distilled_patch16_224 deit_tiny_patch16_224
deit3_small_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn48b eca_nfnet_l0 edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientnet_b0 efficientnetv2_s efficientvim_m1 efficientvit_b0 efficientvit_m0
ese_vovnet19b_slim eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b flexivit_small
focalnet_tiny_srf gcresnext26ts gcvit_xxtiny gernet_s ghostnet_050 ghostnetv2_100 ghostnetv3_100 gmixer_12_224
gmlp_ti16_224 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_035 lcnetv2_small
legacy_seresnet18 legacy_xception levit_128s levit_conv_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256
maxxvitv2_nano_rw_256 mixer_s32_224 mixnet_s mnasnet_050 mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050
mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 mobilenetv5_base mobileone_s0 mobilevit_xxs mobilevitv2_050
mvitv2_tiny mvitv2_small_cls naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small nf_resnet26 nf_regnet_b0
pit_ti_224 pit_ti_distilled_224 pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny
regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s res2next50 resmlp_12_224
resnest14d resnet18 resnet50_clip resnetrs50 resnetv2_18 resnext26ts rexnet_100 sam2_hiera_tiny
samvit_base_patch16_224 selecsls42 semnasnet_050 sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 tf_efficientnet_lite0 tiny_vit_5m_224
tinynet_e tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11 visformer_tiny vit_base_patch16_radio_v3
vit_medium_patch16_gap_240 vit_pe_core_tiny_patch16_384 vit_relpos_small_patch16_224 vit_small_patch14_reg4_dinov2
vit_small_patch16_dinov3 vit_small_patch16_rope_224 vit_small_resnet26d_224 vit_base_patch16_siglip_224
vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 wide_resnet50_2 xception41
xcit_nano_12_p16_224
"""


# Their builders take no input size.
FIXED = ("csatv2", "sam2_hiera_tiny")


def row(name: str) -> str:
    torch.manual_seed(0)
    size = timm.get_pretrained_cfg_value(name, "input_size") or (3, 224, 224)
    # Large inputs take long and change only the grid.
    options = {"img_size": 224} if size[1] > 400 and name not in FIXED else {}
    size = (3, 224, 224) if options else size
    model = timm.create_model(name, pretrained=False, **options).eval()
    try:
        feature_map = last_feature_map(model, torch.randn(1, *size))
    except ValueError as error:
        return f"| `{name}` | {size[1]}x{size[2]} | none | | {str(error).partition('.')[0]} |"
    shape = "x".join(map(str, feature_map.shape))
    return f"| `{name}` | {size[1]}x{size[2]} | `{feature_map.name}` | {shape} | {feature_map.form} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=FAMILIES.split())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = ["# The layer to explain", "", f"timm {timm.__version__}, torch {torch.__version__}, random weights.", ""]
    lines += ["| model | input | layer | feature map | layout |", "| --- | --- | --- | --- | --- |"]
    for name in arguments.models:
        start = time.perf_counter()
        lines.append(row(name))
        sys.stdout.write(f"{lines[-1]} {time.perf_counter() - start:.1f} s\n")
        sys.stdout.flush()
        if arguments.output:
            arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
