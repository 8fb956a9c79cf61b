"""Stage 1: train a multi-label classifier with the USAGE objective, from image-level labels alone.

    python train_cls.py --backbone resnet50                        the toy scenes, in minutes on a CPU
    python train_cls.py --data VOC --download --backbone deit_small
    python train_cls.py --temperature inf --reg-weight 0           plain CAM; 0 instead of inf: multiple-instance learning
    torchrun --nproc-per-node 4 -- train_cls.py ...                several processes, --batch-size shared among them

Writes classifier.pt and classifier.jsonl into the run folder; started again, it goes on after the last finished epoch.
Next: make_seeds.py.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

import usage

# The defaults, per kind of network and of data. All numbers OURS: those of the paper are not known to us, beyond its
# rule "CNN: large temperature, Transformer: small temperature" (PAPER). "toy" is trained from scratch. `epochs` have L_GEN
# alone, `reg_epochs` after them L_REG too: set in with the first step, it flattens the maps before they are any good.
RECIPES = {
    ("cnn", "toy"): dict(
        temperature=math.inf, reg_weight=0.3, reg_temperature=1.0, teacher_temperature=0.7, max_rate=0.2,
        weights="none", size=81, epochs=6, reg_epochs=2, batch_size=16, lr=1e-3, weight_decay=0.05),
    ("transformer", "toy"): dict(
        temperature=1.0, reg_weight=0.3, reg_temperature=1.0, teacher_temperature=1.0, max_rate=0.5,
        weights="none", size=112, epochs=3, reg_epochs=2, batch_size=16, lr=1e-3, weight_decay=0.05),
    ("cnn", "photos"): dict(
        temperature=math.inf, reg_weight=1.0, reg_temperature=2.0, teacher_temperature=0.4, max_rate=0.5,
        weights="imagenet", size=225, epochs=4, reg_epochs=4, batch_size=16, lr=1e-4, weight_decay=0.05),
    ("transformer", "photos"): dict(                            # not measured: no pretrained DeiT was at hand
        temperature=1.0, reg_weight=0.3, reg_temperature=1.0, teacher_temperature=1.0, max_rate=0.5,
        weights="imagenet", size=224, epochs=6, reg_epochs=4, batch_size=32, lr=1e-4, weight_decay=0.05),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     epilog="Flags without a default here take it from the table RECIPES in this file.")
    add = parser.add_argument
    add("--run", type=Path, help="folder of the results; default runs/DATA-BACKBONE")
    add("--data", default="toy", help='"toy" or a folder in the layout of PASCAL VOC or MS COCO (default toy)')
    add("--download", action="store_true", help="fetch PASCAL VOC 2012 (2 GB) into --data first")
    add("--backbone", default="resnet50", choices=usage.BACKBONES, help="default resnet50")
    add("--weights", help='"imagenet", "none" or a state dict; pretrained CNNs keep their BatchNorm frozen')
    add("--temperature", type=float, help="tau1: larger spreads the seed, smaller focuses it; inf is CAM")
    add("--attention", action="store_true", help="Transformers: the class token's attention as L_GEN's alpha, without tau1")
    add("--reg-weight", type=float, help="lambda: weight of L_REG, reached as the classifier learns; 0 switches it off")
    add("--reg-temperature", type=float, help="tau2: temperature of the student's alpha in L_REG")
    add("--teacher-temperature", type=float, help="as --reg-temperature, for the teacher; lower sharpens the target")
    add("--max-rate", type=float, help="the student's drop rate when all is learnt")
    add("--weak-ratio", type=float, default=0.5, help="the teacher's drop rate, as a part of the student's (default 0.5)")
    add("--adaptive", action=argparse.BooleanOptionalAction, default=True,
        help="rates and lambda follow the learning status (default yes), or are fixed from the first step on")
    add("--views", choices=("adjusted", "geometric"), default="adjusted",
        help="what differs in L_REG: the networks (default), or the images: the teacher sees them mirrored and smaller")
    add("--teacher-decay", type=float, default=0.99, help="of the moving average, per step (default 0.99)")
    add("--size", type=int, help="side of the training crops; best 16k+1 for CNNs, 16k for Transformers")
    add("--epochs", type=int, help="first, L_GEN alone")
    add("--reg-epochs", type=int, help="then, L_GEN + lambda * L_REG, at half the learning rate if there was a first")
    add("--batch-size", type=int, help="over all processes; halve it when memory runs out")
    add("--lr", type=float, help="peak of the one-cycle schedule; the classifier on a pretrained trunk gets 10 times that")
    add("--weight-decay", type=float)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=usage.WORKERS, help=f"processes that load images (default {usage.WORKERS})")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA where there is one)")
    args = parser.parse_args()
    args.photos = args.data != "toy"
    kind = "cnn" if args.backbone in usage.CNNS else "transformer"
    for flag, value in RECIPES[kind, "photos" if args.photos else "toy"].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    args.run = args.run or Path("runs") / f"{Path(args.data).resolve().name}-{args.backbone}"
    check_arguments(args)
    return args


def check_arguments(args):
    for flag, low, high in (("temperature", 0, math.inf), ("reg_weight", 0, math.inf), ("reg_temperature", 0, math.inf),
                            ("teacher_temperature", 0, math.inf), ("max_rate", 0, 1), ("weak_ratio", 0, 1),
                            ("teacher_decay", 0, 1), ("size", 16, 10**5), ("epochs", 0, 10**6), ("reg_epochs", 0, 10**6),
                            ("batch_size", 1, 10**6), ("lr", 0, math.inf), ("weight_decay", 0, math.inf)):
        if not low <= getattr(args, flag) <= high:
            raise usage.InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: pass {low} to {high}")
    if not args.epochs + args.reg_epochs:
        raise usage.InputError("--epochs 0 and --reg-epochs 0: nothing to train; pass more")
    if args.attention and args.backbone in usage.CNNS:
        raise usage.InputError(f"--attention: {args.backbone} has no class token; pass a deit as --backbone")


class LabelledImages(Dataset):
    """Image and image-level labels: ((3, size, size), (C,)). Never opens a mask.

    The random cut of an image depends on seed, epoch and index alone, not on the number of workers or processes.
    """

    def __init__(self, data, split, transform, seed=0):
        self.seed, self.epoch = seed, 0
        self.ids = data.split(split)
        self.labels = data.labels(self.ids)
        self.paths = [data.images[name] for name in self.ids]
        self.transform = transform

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        with usage.random_numbers(self.seed, self.epoch, index):
            return self.transform(usage.read_image(self.paths[index])), self.labels[index]


def mirrored_activations(network, images):
    """Activations (B, C, h, w) of images (B, 3, H, W), seen mirrored and at 3/4 of their size, put back in place."""
    size = usage.fitting_size([0.75 * side for side in images.shape[-2:]], network.align_corners)
    view = F.interpolate(images.flip(-1), size, mode="bilinear", align_corners=False, antialias=True)
    h, w = (math.ceil(side / usage.STRIDE) for side in images.shape[-2:])
    return F.interpolate(network(view).float().flip(-1), (h, w), mode="bilinear", align_corners=network.align_corners)


def one_cycle(progress):
    """The learning rate as a part of its peak, over a cycle from 0 to 1: up linearly in 0.2 of it, down by a cosine."""
    return progress / 0.2 if progress < 0.2 else 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - 0.2) / 0.8))


@torch.no_grad()
def classify(network, loader, args, device):
    """Mean average precision and accuracy per label of a network: floats in [0, 1]."""
    network.eval()
    scores, labels = [], []
    for images, target in loader:
        images = images.to(device, memory_format=torch.channels_last)
        scores.append(usage.score_images(network, images, args.temperature, args.attention).cpu())
        labels.append(target)
    scores, labels = torch.cat(scores), torch.cat(labels)                       # (images, C)
    accuracy = ((scores > 0) == (labels > 0.5)).float().mean().item()
    hits = labels.gather(0, scores.argsort(0, descending=True))                 # best first
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    average = (precision * hits).sum(0) / hits.sum(0)                           # (C,), NaN for classes without an image
    return average[hits.sum(0) > 0].mean().item(), accuracy


def main():
    args = parse_arguments()
    device, rank, world = usage.start_processes(args.device, args.workers)
    if args.batch_size % world:
        raise usage.InputError(f"--batch-size {args.batch_size}: pass a multiple of the {world} processes")

    # ---- data
    data = usage.open_data(args.data, args.download) if rank == 0 else None     # one draws or downloads, the others wait
    if world > 1:
        torch.distributed.barrier()
    data = data or usage.open_data(args.data)
    split = "train_aug" if data.has_split("train_aug") else "train"
    colour = [v2.ColorJitter(0.3, 0.3, 0.3)] if args.photos else []             # OURS; on the toy, colour is a class's hint
    train_set = LabelledImages(data, split, v2.Compose([
        v2.RandomResizedCrop(args.size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip(), *colour,
        usage.TO_TENSOR]), args.seed)
    sampler = DistributedSampler(train_set, world, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(train_set, args.batch_size // world, sampler=sampler, num_workers=args.workers, drop_last=True,
                        pin_memory=device.type == "cuda")
    if not len(loader):
        raise usage.InputError(f"--batch-size {args.batch_size}: {split} has {len(train_set)} images; pass fewer")
    if rank == 0:
        print(f"{data.root}: {len(train_set)} images of {split}"
              + (" (there is no train_aug.txt)" if split == "train" and data.masks and args.photos else "")
              + f", {len(data.classes)} classes; {args.backbone} on {device} x {world}, run folder {args.run}")

    # ---- student, teacher, optimiser
    torch.manual_seed(args.seed)
    student = usage.build_network(args.backbone, len(data.classes), args.weights)
    student = student.to(device, memory_format=torch.channels_last)
    frozen = args.weights != "none" and args.backbone in usage.CNNS             # BatchNorm: the field's custom
    if frozen:
        usage.freeze_batchnorm(student)
    teacher = usage.ema_teacher(student, args.teacher_decay)
    groups = [{"params": [p for p in student.trunk.parameters() if p.requires_grad], "lr": args.lr},
              {"params": student.classifier.parameters(), "lr": args.lr * (10 if args.weights != "none" else 1)}]
    optimiser = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    first, epochs = args.epochs * len(loader), args.epochs + args.reg_epochs    # steps of L_GEN alone; epochs in all

    def rate(step):
        if step < first:
            return one_cycle(step / first)
        return (0.5 if first else 1.0) * one_cycle((step - first) / max(1, epochs * len(loader) - first))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    ddp = nn.parallel.DistributedDataParallel(student) if world > 1 else student

    # ---- resume
    path = args.run / "classifier.pt"
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "download", "workers", "device")}
    settings |= {"data": str(data.root.resolve()), "classes": data.classes, "split": split}
    parts = {"student": student, "teacher": teacher, "optimiser": optimiser, "schedule": schedule}
    state = {"epoch": 0, "running": math.log(2), "seconds": 0.0} | usage.resume(path, settings, parts)
    epoch, running, seconds = state["epoch"], state["running"], state["seconds"]
    if epoch and rank == 0:
        print(f"{path}: {epoch} of {epochs} epochs done")

    # ---- training
    log = usage.Log(args.run / "classifier.jsonl", epochs * len(loader) * args.batch_size,
                    epoch * len(loader) * args.batch_size)
    while epoch < epochs:
        start = time.time()
        torch.manual_seed(hash((args.seed, epoch, rank)))                       # an epoch done again is the same epoch
        sampler.set_epoch(epoch)
        train_set.epoch = epoch
        regularized = args.reg_weight > 0 and epoch >= args.epochs
        adjusted = regularized and args.views == "adjusted"
        for network in (student, teacher):
            network.train()
            if frozen:
                usage.freeze_batchnorm(network)
        for step, (images, labels) in enumerate(loader, start=epoch * len(loader) + 1):
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(device, non_blocking=True)                       # (B, C)
            q = usage.learning_status(running) if args.adaptive else 1.0
            strong, weak = usage.adjustment_rates(q, args.max_rate, args.weak_ratio)
            usage.set_adjustment(student, strong if adjusted else 0.0)
            usage.set_adjustment(teacher.module, weak if adjusted else 0.0)

            with usage.fast_autocast(device):                                   # strongly adjusted, s (B, C, h, w)
                s, attention = ddp(images, return_attention=True) if args.attention else (ddp(images), None)
            if args.attention:                                                  # (B, 1, h, w)
                generation = F.multilabel_soft_margin_loss(usage.class_scores(s, attention), labels)
            else:
                generation = usage.generation_loss(s, labels, args.temperature)
            loss, regularization = generation, torch.zeros_like(generation)
            if regularized:
                with usage.fast_autocast(device), torch.no_grad():              # weakly adjusted: (B, C, h, w)
                    target = teacher.module(images) if adjusted else mirrored_activations(teacher.module, images)
                unit = target.float().std((2, 3), keepdim=True).clamp_min(1)        # OURS: (B, C, 1, 1), see README
                alpha = usage.spatial_activation_distribution(s / unit, args.reg_temperature)
                target = usage.spatial_activation_distribution(target / unit, args.teacher_temperature)
                regularization = usage.consistency_loss(alpha, target, labels)
                if world > 1:                                                   # a mean over the pairs of all processes
                    pairs = labels.sum()
                    total = pairs.clone()
                    torch.distributed.all_reduce(total)
                    regularization = regularization * pairs * world / total.clamp_min(1)
                loss = generation + args.reg_weight * q * regularization        # OURS: lambda grows with q, see README
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if args.reg_weight:
                teacher.update_parameters(student)

            terms = torch.stack([generation.detach(), regularization.detach()])
            if world > 1:
                torch.distributed.all_reduce(terms, torch.distributed.ReduceOp.SUM)
            generation, regularization = (terms / world).tolist()
            if not math.isfinite(generation + regularization):
                raise usage.InputError(f"step {step}: the loss is not finite (L_GEN {generation}, L_REG {regularization}); "
                                       f"lower --lr or --reg-weight; {path} holds the last finished epoch")
            running += 0.05 * (generation - running)                            # OURS: a memory of about 20 steps
            if rank == 0 and (step % 10 == 0 or step == epochs * len(loader)):
                print("\r" + log.line(step * args.batch_size, step=step, L_GEN=generation, L_REG=regularization, q=q,
                                      lr=schedule.get_last_lr()[0]), end="  ", flush=True)
        epoch, seconds = epoch + 1, seconds + time.time() - start
        if rank == 0:
            usage.save_checkpoint(path, {"settings": settings, "epoch": epoch, "running": running, "seconds": seconds,
                                         **{name: part.state_dict() for name, part in parts.items()}})

    # ---- classification on unseen images
    if rank == 0 and data.has_split("val"):
        size = usage.fitting_size((args.size, args.size), student.align_corners)
        val_set = LabelledImages(data, "val", v2.Compose([v2.Resize(size, antialias=True), usage.TO_TENSOR]))
        precision, accuracy = classify(student, DataLoader(val_set, args.batch_size, num_workers=args.workers),
                                       args, device)
        print(f"\nval, {len(val_set)} images: mAP {precision:.3f}, accuracy per label {accuracy:.3f}, trained in "
              f"{seconds / 60:.1f} min\nnext: python make_seeds.py --run {args.run}")


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again"):
        main()
