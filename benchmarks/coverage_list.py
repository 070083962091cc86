"""The networks of the census by class, with their names in timm.

Prefixes: tv: (torchvision), tvs: (its segmentation), tvd: (its detection backbones), own: (ours); features: and pooled:
are the outputs of a timm model's `forward_features`, and before its classifier.

`FIRST` are those of the first census, whose records stay valid; `MORE` were measured later.
"""

from __future__ import annotations

TIMM = """
    resnet18 resnet50 resnext50_32x4d resnetblur18 resnetaa50 resnet50d resnetv2_50 resnet51q regnetx_002
    densenet121 densenetblur121d vgg11_bn vgg11 convnext_atto convnext_atto_ols convnext_atto_rms convnext_tiny_hnf
    efficientnet_lite0 efficientnet_es fbnetc_100 mobilenetv1_100 mobilenetv2_100 mobilenet_edgetpu_v2_s
    mobilenetv4_conv_small mobilenetv4_conv_aa_medium mobilenetv4_conv_blur_medium mnasnet_100 spnasnet_100 dla34
    dla60x dla60_res2net hrnet_w18_small hrnet_w18_ssld hrnet_w30 res2net50_26w_4s res2net50d nf_resnet26 repvgg_a0
    mobileone_s0 gernet_s inception_v3 inception_v4 inception_resnet_v2 inception_next_atto xception41 xception41p
    legacy_xception dpn48b dpn68b darknet53 darknetaa53 cspresnet50 cspdarknet53 cs3darknet_focus_s cs3darknet_s
    selecsls42b vovnet39a nasnetalarge pnasnet5large starnet_s1 fasternet_t0 hgnetv2_b0 convmixer_768_32
    mambaout_femto convformer_s18 halonet26t
""".split()
TORCHVISION = """
    googlenet shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5 alexnet convnext_tiny resnet18 densenet121 inception_v3
""".split()
CLASS_A = [*TIMM, *(f"tv:{name}" for name in TORCHVISION), "tvs:fcn_resnet50", "own:unet_t", "own:unet_i", "own:fpn"]
CLASS_B = """
    resnet50_gn seresnet50 ecaresnet26t resnetrs50 resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn
    gcresnet33ts regnety_002 regnetz_005 regnetv_040 regnetz_b16 rdnet_tiny convnextv2_atto efficientnet_b0
    efficientnet_b0_gn efficientnet_b0_g16_evos efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_x_b3
    tf_efficientnet_b0 tf_efficientnetv2_b0 efficientnetv2_s gc_efficientnetv2_rw_t mixnet_s tf_mixnet_s fbnetv3_b
    mobilenetv3_small_100 mobilenetv3_large_100 tf_mobilenetv3_small_100 lcnet_050 lcnetv2_small tinynet_e
    semnasnet_100 hardcorenas_a rexnet_100 rexnetr_100 ghostnet_100 ghostnetv2_100 ghostnetv3_100 repghostnet_050
    resnest14d resnest50d_4s2x40d nf_seresnet26 nf_ecaresnet26 nfnet_f0 dm_nfnet_f0 eca_nfnet_l0 nfnet_l0 nf_regnet_b0
    skresnet18 repvgg_d2se legacy_seresnet18 legacy_senet154 cs3sedarknet_l cspnext_tiny tresnet_m ese_vovnet19b_dw
    ese_vovnet39b eca_vovnet39b hgnet_tiny repvit_m0_9 fastvit_t8 poolformer_s12 poolformerv2_s12 focalnet_tiny_srf
    efficientvit_b0 efficientvit_l1 mobilevitv2_050 swiftformer_xs lambda_resnet26t tv:mobilenet_v3_small
    tv:efficientnet_v2_s tv:regnet_y_400mf tvs:deeplabv3_mobilenet_v3_large tvs:lraspp_mobilenet_v3_large own:unet_in
    edgenext_xx_small edgenext_small_rw skresnext50_32x4d
""".split()
CLASS_C = """
    mobilenetv4_hybrid_medium fastvit_sa12 caformer_s18 mobilevit_xxs nextvit_small shvit_s1 iformer_t lowformer_b0
    cpubone_nano mobilenetv5_300m bat_resnext26ts csatv2
""".split()
FIXED = """
    efficientformerv2_s0 botnet26t_256 sebotnet33ts_256 visformer_tiny swin_tiny_patch4_window7_224
    vit_tiny_patch16_224
""".split()  # these accept only one image size
FIRST = {
    **dict.fromkeys(CLASS_A, "a"),
    **dict.fromkeys(CLASS_B, "b"),
    **dict.fromkeys(CLASS_C, "c"),
    **dict.fromkeys(FIXED, "fixed"),
}

# Families: transformers with class tokens, windows, grids, hybrids, pooled and cross-covariance attention.
ATTENTION = """
    vit_small_patch32_224 vit_tiny_r_s16_p8_224 vit_small_r26_s32_224 vit_relpos_small_patch16_224
    vit_srelpos_small_patch16_224 vit_little_patch16_reg4_gap_256 vit_dwee_patch16_reg1_gap_256 flexivit_small
    deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224
    eva02_tiny_patch14_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tv:swin_t tv:swin_v2_t
    maxvit_pico_rw_256 maxvit_nano_rw_256 maxvit_rmlp_pico_rw_256 maxvit_tiny_tf_224 maxxvit_rmlp_nano_rw_256
    maxxvitv2_nano_rw_256 coatnet_pico_rw_224 coatnet_nano_rw_224 coatnet_0_rw_224 coatnet_rmlp_nano_rw_224
    coatnext_nano_rw_224 efficientformer_l1 efficientformerv2_s1 mobilevit_xs mobilevit_s botnet50ts_256
    eca_botnext26ts_256 gcvit_xxtiny volo_d1_224 davit_tiny xcit_nano_12_p16_224 cait_xxs24_224 convit_tiny levit_128s
    levit_conv_128s crossvit_tiny_240 pit_ti_224 pit_ti_distilled_224 tnt_s_legacy_patch16_224 nest_tiny visformer_small
    twins_pcpvt_small twins_svt_small pvt_v2_b0 pvt_v2_b1 mvitv2_tiny sehalonet33ts eca_halonext26ts
    lamhalobotnet50ts_256 coat_tiny coat_lite_tiny tiny_vit_5m_224 hiera_tiny_224 hieradet_small efficientvit_m0
    shvit_s2 features:vit_small_patch32_224 pooled:vit_small_patch32_224 features:swin_tiny_patch4_window7_224
    mixer_s32_224 sequencer2d_s
""".split()
MORE = {
    **dict.fromkeys(("features:resnet18", "pooled:convnext_atto", "tvd:resnet18"), "a"),
    **dict.fromkeys(("pooled:efficientnet_b0", "tvs:deeplabv3_resnet50", "tvd:mobilenet_v3_large"), "b"),
    **dict.fromkeys(ATTENTION, "c"),
}
CLASSES = FIRST | MORE
