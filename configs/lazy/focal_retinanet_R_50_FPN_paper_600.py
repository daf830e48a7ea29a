from detectron2.config import LazyCall as L

from focal_det.modeling import ImageNormalizer

from .focal_retinanet_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.normalizer = L(ImageNormalizer)()
model.smooth_l1_beta = 0.11

_shortest, _longest = 600, 1000
for _loader in (dataloader.train, dataloader.test):
    _resize = _loader.mapper.augmentations[0]
    _resize.short_edge_length, _resize.max_size = (_shortest,), _longest

lr_multiplier.warmup_length = 500 / train.max_iter
lr_multiplier.warmup_factor = 1.0 / 3.0
