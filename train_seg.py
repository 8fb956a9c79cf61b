"""Stage 3: train an ordinary segmentation network on the pseudo masks, and let it label the val images.

    python train_seg.py --run runs/toy-resnet50
    python train_seg.py --run runs/toy-resnet50 --pseudo-masks DIR     on anybody's pseudo masks of the same images

The network of stage 1 with torchvision's DeepLab head. Reads classifier.pt and .json, seeds.json and pseudo_masks/. Writes
segmenter.pt, its log segmenter.jsonl, segmentation/<id>.png and what those were made with, segmentation.json, into the run
folder; started again, it goes on after the last finished epoch. No true mask is opened. Next: eval.py.
"""

import argparse
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.transforms import v2

import usage

# The defaults, per kind of network and of start. All numbers OURS; the authors' own segmentation is DeepLab or larger.
RECIPES = {
    ("cnn", "scratch"): dict(epochs=4, batch_size=16, lr=3e-4),
    ("transformer", "scratch"): dict(epochs=4, batch_size=16, lr=3e-4),
    ("cnn", "pretrained"): dict(epochs=5, batch_size=16, lr=1e-4),
    ("transformer", "pretrained"): dict(epochs=8, batch_size=16, lr=1e-4),
}
SCALES = (1.0, 1.5)                 # OURS: at test time, each with its mirror image


@torch.no_grad()
def predict(segmenter, image, size, refine):
    """The label map (H, W) of an image (1, 3, H, W): scales and flips voted by probability, edges as those of seeds."""
    logits = usage.multi_scale_activations(segmenter, image, size, SCALES, flip=True)
    votes = sum(F.interpolate(s.float(), image.shape[-2:], mode="bilinear", align_corners=False).softmax(1)
                for s in logits)                                                    # (1, C + 1, H, W)
    share = votes[:, 1:] / (votes[:, 1:] + votes[:, :1])        # (1, C, H, W), above 0.5 where a class beats the background
    classes = (share.amax((0, 2, 3)) > 0.1).nonzero()[:, 0]                         # (K,) those in question
    share = share[:, classes]
    if refine and len(classes):
        share = usage.refine_maps(image, share, 0.5)
    return usage.label_map(share, 0.5, classes)[0]


def main():
    number = usage.number
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     epilog="Flags without a default here take it from the table RECIPES in this file.")
    parser.error = usage.fail
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy-resnet50"), help="folder of stages 1 and 2 (default runs/toy-resnet50)")
    add("--data", help="where the data lies now, if it has moved since stage 1")
    add("--pseudo-masks", type=Path, help="label maps to learn from; 255 is ignored (default: what make_seeds.py left)")
    add("--epochs", type=number(1, 10**6, int))
    add("--batch-size", type=number(2, 10**6, int), help="over all processes; halve it when memory runs out")
    add("--lr", type=number(0, 1e6), help="start of the polynomial schedule for the trunk; the new head gets 10 times that")
    add("--refine", action=argparse.BooleanOptionalAction, default=True,
        help="let the predicted label maps follow the edges of the image (default yes)")
    add("--seed", type=number(0, 2**32, int), default=0, help="of all random numbers (default 0)")
    add("--workers", type=number(0, usage.CORES, int), default=usage.WORKERS, help=f"load images (default {usage.WORKERS})")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA where there is one)")
    args = parser.parse_args()
    device = usage.start_processes(args.device)

    # ---- the run so far
    segmenter, trained = usage.load_classifier(args.run)
    usage.take_defaults(args, RECIPES, trained["backbone"], trained["weights"])
    folder = args.pseudo_masks or args.run / "pseudo_masks"
    remedy = "add it, or correct --pseudo-masks" if args.pseudo_masks else f"run make_seeds.py --run {args.run} to its end"
    data = usage.open_run_data(args.run, trained, args.data, [folder])
    ids, val_ids = data.ids(trained["split"]), data.ids("val") if "val" in data.splits else []
    if not args.pseudo_masks:
        seeds, files = args.run / "seeds.json", usage.fingerprint(ids, data.labels(ids), *data.sizes(ids))
        made_of = {"classifier": trained["classifier"], "input_files": files}
        usage.check_settings(seeds, usage.read_json(seeds, remedy=remedy), made_of, remedy)
    masks = [folder / f"{name}.png" for name in ids]
    for mask in masks:
        if not usage.is_there(mask):
            raise usage.InputError(f"{mask}: not there, or empty; {remedy}")
    transform = v2.Compose([v2.RandomResizedCrop(trained["size"], scale=(0.4, 1.0)), v2.RandomHorizontalFlip(),
                            v2.ColorJitter(*3 * [trained["jitter"]]), usage.TO_TENSOR])
    photographs = usage.Photographs(data, ids, folder, transform, args.seed)
    loader = usage.training_loader(photographs, args.batch_size, args.workers, device)
    print(f"{data.root}: {len(ids)} label maps of {folder}; {trained['backbone']} with DeepLab's head on {device} x "
          f"{usage.WORLD}")

    # ---- network and optimiser
    torch.manual_seed(args.seed)
    channels = segmenter.classifier.in_channels
    segmenter.classifier = DeepLabHead(channels, len(data.classes) + 1, atrous_rates=(6, 12, 18))   # DeepLab's at stride 16
    segmenter = segmenter.to(device, memory_format=torch.channels_last)
    groups = [{"params": segmenter.trunk.parameters(), "lr": args.lr},
              {"params": segmenter.classifier.parameters(), "lr": 10 * args.lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=trained["weight_decay"], fused=True)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, args.epochs * len(loader), power=0.9)
    ddp = nn.parallel.DistributedDataParallel(segmenter) if usage.WORLD > 1 else segmenter

    # ---- training
    settings = {"classifier": trained["classifier"], "input_files": usage.fingerprint(ids, data.sizes(ids), *masks),
                "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    val = usage.fingerprint(val_ids, data.sizes(val_ids))
    predicted_with = settings | {"refine": args.refine, "split": "val", "val": val, "classes": data.classes,
                                 "data": str(data.root.resolve())}
    usage.check_results(args.run / "segmentation.json", predicted_with, [args.run / "segmentation"])
    parts = {"segmenter": segmenter, "optimiser": optimiser, "schedule": schedule}
    for _, log in usage.training_epochs(args.run / "segmenter.pt", settings, parts, {"epoch": 0}, args.epochs, loader):
        segmenter.train()
        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(device, non_blocking=True).long()                # (B, H, W), the pseudo masks
            logits = ddp(images)                                                # (B, C + 1, h, w)
            logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
            counted = (labels != usage.VOID).sum().clamp_min(1)
            loss = F.cross_entropy(logits, labels, ignore_index=usage.VOID, reduction="sum") / counted
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            lr = schedule.get_last_lr()[0]
            print(log.line(args.batch_size, loss=usage.process_mean(loss)[0], lr=lr), end="", flush=True)
            schedule.step()

    # ---- prediction
    usage.wait_for_all()                                                        # for the file
    predicted_with["segmenter"] = usage.fingerprint(args.run / "segmenter.pt")
    usage.check_results(args.run / "segmentation.json", predicted_with, [args.run / "segmentation"])
    todo = [name for name in val_ids[usage.RANK::usage.WORLD] if not usage.is_there(args.run / f"segmentation/{name}.png")]
    print(f"\nlabelling {len(val_ids)} images of val")
    segmenter.eval()
    log = usage.Log(args.run / "segmentation.jsonl", len(todo), folders=[args.run / "segmentation"])
    if val_ids:
        usage.write_json(args.run / "segmentation.json", predicted_with)
    images = usage.Photographs(data, todo, torch.zeros(len(todo)))
    for name, (image, _) in zip(todo, DataLoader(images, batch_size=None, num_workers=args.workers)):
        labels = predict(segmenter, image[None].to(device), trained["size"], args.refine)
        usage.save_mask(args.run / f"segmentation/{name}.png", labels.cpu())
        print(log.line(1), end="", flush=True)
    usage.wait_for_all()
    if val_ids and data.has_masks(val_ids):
        print(f"\nnext: python eval.py --run {shlex.quote(str(args.run))}")


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again: it goes on after the last finished epoch"):
        main()
