from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from focal_det.losses import FocalLoss
from focal_det.modeling import EMANormalizer, FocalRetinaNet, FocalRetinaNetHead

_zoo = "COCO-Detection/retinanet_R_50_FPN_1x.py"
dataloader, lr_multiplier, model, optimizer, train = (
    model_zoo.get_config(_zoo)[part]
    for part in ("dataloader", "lr_multiplier", "model", "optimizer", "train")
)

model._target_ = FocalRetinaNet
model.head._target_ = FocalRetinaNetHead
model.cls_loss = L(FocalLoss)(alpha=0.25, gamma=2.0)
model.normalizer = L(EMANormalizer)()
del model.focal_loss_alpha, model.focal_loss_gamma
