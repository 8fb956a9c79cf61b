"""Stage 1: train a multi-label classifier with the USAGE objective, from image-level labels alone.

    python train_cls.py --backbone resnet50                        the toy scenes, in minutes on a CPU
    python train_cls.py --data VOC --download --backbone deit_small
    python train_cls.py --temperature inf --reg-weight 0           plain CAM; 0 instead of inf: multiple-instance learning
    torchrun --nproc-per-node 4 -- train_cls.py ...                several processes, --batch-size shared among them

Writes into the run folder: classifier.pt, its log classifier.jsonl, and classifier.json with the mAP and the probability
from which a class is predicted. Started again, it goes on after the last finished epoch. Opens no mask.
Next: make_seeds.py.
"""

import argparse
import colorsys
import functools
import json
import math
import shlex
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import usage

# The defaults, per kind of network and of initial weights: ImageNet's, or none. All numbers are OURS. Temperatures, lambda
# and reg_epochs were chosen on every second training image of 1000 VOC photographs (pretrained) or on the toy (scratch),
# see EVIDENCE.md; the others were hardly searched. The paper's are not known to us, beyond its rule "CNN: large temperature,
# Transformer: small temperature" (PAPER). `epochs` have L_GEN alone, `reg_epochs` after them L_REG too, once a teacher has
# something to teach. `jitter` is of colours: none on the toy, where they hint at the class. A backbone's own row goes first.
RECIPES = {
    ("cnn", "scratch"): dict(
        temperature=math.inf, reg_weight=0.1, reg_temperature=1.0, teacher_temperature=0.7, max_rate=0.5,
        size=81, jitter=0.0, epochs=4, reg_epochs=3, batch_size=16, lr=1e-3, weight_decay=0.05),
    ("transformer", "scratch"): dict(
        temperature=3.0, reg_weight=0.3, reg_temperature=1.0, teacher_temperature=1.0, max_rate=0.5,
        size=112, jitter=0.0, epochs=6, reg_epochs=2, batch_size=16, lr=1e-3, weight_decay=0.05),
    ("cnn", "pretrained"): dict(
        temperature=30.0, reg_weight=1.0, reg_temperature=2.0, teacher_temperature=0.4, max_rate=0.5,
        size=225, jitter=0.3, epochs=4, reg_epochs=4, batch_size=16, lr=1e-4, weight_decay=0.05),
    ("transformer", "pretrained"): dict(
        temperature=6.0, reg_weight=0.3, reg_temperature=2.0, teacher_temperature=0.4, max_rate=0.5,
        size=224, jitter=0.3, epochs=5, reg_epochs=10, batch_size=16, lr=1e-4, weight_decay=0.05),
    ("resnet101", "scratch"): dict(teacher_temperature=0.5),        # instead of 0.7, which widens its seeds
}
OBJECTIVE = ("temperature", "attention", "reg_weight", "reg_temperature", "teacher_temperature", "max_rate", "weak_ratio",
             "adaptive", "views", "teacher_decay", "seed")      # in a run folder's name, where not the default


def parse_arguments():
    number = usage.number
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     epilog="Flags without a default here take it from the table RECIPES in this file.")
    parser.error = usage.fail
    add = parser.add_argument
    add("--run", type=Path, help="folder of the results; default runs/DATA-BACKBONE, and what is not the default")
    add("--data", type=Path, help='a folder in the layout of PASCAL VOC or MS COCO, or "toy", the default: data/toy')
    add("--download", action="store_true", help="fetch PASCAL VOC 2012 (2 GB) into --data first")
    add("--backbone", default="resnet50", choices=usage.BACKBONES, help="default resnet50")
    add("--weights", help='"imagenet" (default but on the toy), "none" or a state dict; a pretrained CNN freezes BatchNorm')
    add("--temperature", type=number(0, math.inf), help="tau1: larger spreads the seed, smaller focuses it; inf is CAM")
    add("--attention", action="store_true", help="Transformers: the class token's attention as L_GEN's alpha, without tau1")
    add("--reg-weight", type=number(0, 1e6), help="lambda: weight of L_REG, times the learning status; 0 switches it off")
    add("--reg-temperature", type=number(1e-3, 1e6), help="tau2: temperature of the student's alpha in L_REG")
    add("--teacher-temperature", type=number(0, 1e6), help="tau2' of the teacher's; lower than tau2 sharpens the target")
    add("--max-rate", type=number(0, 1), help="the student's drop rate at a learning status of 1")
    add("--weak-ratio", type=number(0, 1), default=0.5, help="the teacher's drop rate, as a part of that (default 0.5)")
    add("--adaptive", action=argparse.BooleanOptionalAction, default=True,
        help="rates and lambda follow the learning status (default yes), or are fixed as soon as L_REG sets in")
    add("--views", choices=("adjusted", "geometric"), default="adjusted",
        help="what differs in L_REG: the networks (default), or the images: the teacher sees them mirrored and smaller")
    add("--teacher-decay", type=number(0, 1), default=0.99, help="of the moving average, per step (default 0.99)")
    add("--size", type=number(16, 10**4, int), help="side of the training crops; best 16k+1 for CNNs, 16k for Transformers")
    add("--jitter", type=number(0, 1), help="of brightness, contrast and saturation, in training")
    add("--epochs", type=number(0, 10**6, int), help="of the first cycle: L_GEN alone")
    add("--reg-epochs", type=number(0, 10**6, int), help="of the second: L_GEN + lambda * q * L_REG, at half the peak rate")
    add("--batch-size", type=number(2, 10**6, int), help="over all processes; halve it when memory runs out")
    add("--lr", type=number(0, 1e6), help="peak of the first cycle; the classifier on a pretrained trunk gets 10 x")
    add("--weight-decay", type=number(0, 1e6))
    add("--seed", type=number(0, 2**32, int), default=0, help="of all random numbers (default 0)")
    add("--workers", type=number(0, usage.CORES, int), default=usage.WORKERS, help=f"load images (default {usage.WORKERS})")
    add("--device", default="auto", help="cuda, cpu, ... (default: CUDA where there is one)")
    args = parser.parse_args()
    if args.download and not args.data:
        raise usage.InputError("--download: name the folder too, --data FOLDER")
    args.data = TOY if args.data in (None, Path("toy")) else args.data
    args.weights = args.weights or ("none" if args.data.resolve() == TOY.resolve() else "imagenet")
    recipe = usage.take_defaults(args, RECIPES, args.backbone, args.weights)
    told = [f"-{key.replace('_', '-')}-{getattr(args, key)}" for key in OBJECTIVE
            if getattr(args, key) != recipe.get(key, parser.get_default(key))]
    args.run = args.run or Path("runs") / f"{args.data.resolve().name}-{args.backbone}{''.join(told)}"
    if not args.epochs + args.reg_epochs:
        raise usage.InputError("--epochs 0 and --reg-epochs 0: nothing to train; pass more")
    if args.attention and args.backbone in usage.CNNS:
        raise usage.InputError(f"--attention: {args.backbone} has no class token; pass a deit as --backbone")
    return args


@torch.no_grad()
def teacher_activations(teacher, images, views, size):
    """s', the teacher's view: of an adjusted network; or, to compare with, of an image mirrored and at 3/4 of its size.

    images (B, 3, H, W), size (h, w) of the student's map -> (B, C, h, w), without gradient, each position where the
    student's is.
    """
    if views == "adjusted":
        return teacher(images)
    smaller = teacher.fitting_size([0.75 * side for side in images.shape[-2:]])
    s = teacher(F.interpolate(images.flip(-1), smaller, mode="bilinear", align_corners=False, antialias=True))
    return F.interpolate(s.float().flip(-1), size, mode="bilinear", align_corners=False)


def learning_rate(step, first, steps):
    """The learning rate of a step as a part of its peak: a cycle for L_GEN alone, and one of half the height for L_REG.

    OURS: each rises linearly in a fifth of its time and falls by a cosine; the second has the full height if it is the only
    one. first: steps of the first cycle; steps: in all.
    """
    start, length, peak = (0, first, 1.0) if step < first else (first, max(1, steps - first), 0.5 if first else 1.0)
    done = (step - start + 0.5) / length                                        # at the middle of the step: never 0
    return peak * (done / 0.2 if done < 0.2 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.2) / 0.8))


@torch.no_grad()
def classify(network, photographs, args, device):
    """The class scores s~ of photographs: (images, C)."""
    network.eval()
    scores = []
    for images, _ in DataLoader(photographs, args.batch_size, num_workers=args.workers):
        images = images.to(device, memory_format=torch.channels_last)
        scores.append(usage.class_scores(*usage.activate(network, images, args.temperature, args.attention)).cpu())
    return torch.cat(scores)


def mean_average_precision(scores, labels):
    """mAP over the classes that occur: (images, C), (images, C) in {0, 1} -> float in [0, 1], NaN if none does."""
    hits = labels.gather(0, scores.argsort(0, descending=True))                 # best first
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    average = (precision * hits).sum(0) / hits.sum(0)                           # (C,), NaN for classes without an image
    return average.nanmean().item()


def class_threshold(scores, labels):
    """The probability above which as many (image, class) pairs lie as the labels have: (images, C) twice -> float.

    OURS: chosen on labels of the training images, no mask is needed.
    """
    ranked = scores.sigmoid().flatten().sort(descending=True).values
    count = int(labels.sum())
    return ranked[max(0, count - 1):count + 1].mean().item()                    # between the last in and the first out


def main():
    args = parse_arguments()
    device = usage.start_processes(args.device)

    # ---- data
    if usage.RANK == 0:                                                         # the others wait
        prepare_data(args.data, args.download)
    usage.wait_for_all()
    data = usage.DataFolder(args.data)
    split = "train_aug" if "train_aug" in data.splits else "train"
    ids, val_ids = data.ids(split), data.ids("val") if "val" in data.splits else []
    train_labels, val_labels = data.labels(ids), None
    try:
        val_labels = data.labels(val_ids) if val_ids else None
    except usage.InputError as error:                                           # images to segment need none
        print(f"val is not classified: {error}")
    chance = usage.chance_loss(train_labels)
    if not chance:
        raise usage.InputError(f"{data.root}: every image of {split} has the same classes; a classifier needs others too")
    transform = v2.Compose([v2.RandomResizedCrop(args.size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip(),
                            v2.ColorJitter(*3 * [args.jitter]), usage.TO_TENSOR])
    photographs = usage.Photographs(data, ids, train_labels, transform, args.seed)
    loader = usage.training_loader(photographs, args.batch_size, args.workers, device)
    first, steps = args.epochs * len(loader), (args.epochs + args.reg_epochs) * len(loader)
    print(f"{data.root}: {len(ids)} images of {split}, {len(data.classes)} classes; {args.backbone} on {device} x "
          f"{usage.WORLD}, {steps} steps{' are few: lower --batch-size' * (steps < 100)}, run folder {args.run}")

    # ---- student, teacher, optimiser
    torch.manual_seed(args.seed)
    state = pretrained_weights(args.backbone, args.weights)
    with usage.reading(f"weights {args.weights}", f"not a state dict of {args.backbone}: pass one, or the right --backbone"):
        student = usage.build_network(args.backbone, len(data.classes), state, frozen=args.weights != "none")
    student = student.to(device, memory_format=torch.channels_last)
    teacher = usage.ema_teacher(student, args.teacher_decay)
    groups = [{"params": student.trunk.parameters(), "lr": args.lr},
              {"params": student.classifier.parameters(), "lr": args.lr * (10 if args.weights != "none" else 1)}]
    optimiser = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, first, steps))
    ddp = nn.parallel.DistributedDataParallel(student) if usage.WORLD > 1 else student

    # ---- training
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "download", "workers", "device")}
    files = usage.fingerprint(data.classes, ids, data.sizes(ids), train_labels, *(state or {}).values())
    settings |= {"data": str(data.root.resolve()), "input_files": files, "classes": data.classes, "split": split}
    status = functools.partial(usage.learning_status, chance=chance) if args.adaptive else lambda _: 1.0   # q
    parts = {"student": student, "teacher": teacher, "optimiser": optimiser, "schedule": schedule}
    progress = {"epoch": 0, "running": math.log(2)}             # the L_GEN of zero logits
    for epoch, log in usage.training_epochs(args.run / "classifier.pt", settings, parts, progress,
                                            args.epochs + args.reg_epochs, loader):
        regularized = args.reg_weight > 0 and epoch >= args.epochs
        max_rate = args.max_rate if regularized and args.views == "adjusted" else 0.0   # OURS: no adjustment before L_REG
        student.train()
        teacher.train()

        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(device, non_blocking=True)                       # (B, C)
            q = status(progress["running"])
            usage.set_adjustment(student, max_rate * q)                                         # strong
            usage.set_adjustment(teacher.module, args.weak_ratio * max_rate * q)                # weak

            s, alpha = usage.activate(ddp, images, args.temperature, args.attention)            # s (B, C, h, w)
            l_gen = usage.generation_loss(s, alpha, labels)
            l_reg = torch.zeros_like(l_gen)
            if regularized:
                s_teacher = teacher_activations(teacher.module, images, args.views, s.shape[2:])     # s' (B, C, h, w)
                unit = usage.activation_unit(s_teacher)                                         # u  (B, C, 1, 1)
                log_alpha = usage.spatial_activation_distribution(s / unit, args.reg_temperature, log=True)
                teacher_alpha = usage.spatial_activation_distribution(s_teacher / unit, args.teacher_temperature)
                l_reg = usage.consistency_loss(log_alpha, teacher_alpha, labels)
            loss = l_gen + args.reg_weight * q * l_reg          # OURS: times q, lest an untrained teacher teach

            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            teacher.update_parameters(student)

            values = dict(zip(("L_GEN", "L_REG"), usage.process_mean(l_gen, l_reg)))
            print(log.line(args.batch_size, **values, q=q, lr=schedule.get_last_lr()[0]), end="", flush=True)
            schedule.step()
            progress["running"] += 0.05 * (values["L_GEN"] - progress["running"])       # OURS: a memory of about 20 steps

    # ---- what the classifier has learnt
    if usage.RANK == 0:
        print()
        whole = v2.Compose([v2.Resize(student.fitting_size((args.size, args.size)), antialias=True), usage.TO_TENSOR])
        some = slice(None, None, max(1, len(ids) // 1000))
        scores = classify(student, usage.Photographs(data, ids[some], train_labels[some], whole), args, device)
        learnt = {"class_threshold": class_threshold(scores, train_labels[some]),
                  "classifier": usage.fingerprint(*student.state_dict().values())}
        if val_labels is not None:
            scores = classify(student, usage.Photographs(data, val_ids, val_labels, whole), args, device)
            precision = mean_average_precision(scores, val_labels)
            learnt["mAP"] = precision if math.isfinite(precision) else None     # JSON has no NaN
            print(f"val, {len(val_ids)} images: mAP {precision:.3f}")
        usage.write_json(args.run / "classifier.json", learnt)
        print(f"next: python make_seeds.py --run {shlex.quote(str(args.run))}")


# ==== ImageNet weights ================================================================================================

DEIT_WEIGHTS = "https://dl.fbaipublicfiles.com/deit/{}.pth"     # of Touvron et al., facebookresearch/deit
DEIT_FILES = {"deit_tiny": "deit_tiny_patch16_224-a1311bcf", "deit_small": "deit_small_patch16_224-cd65a155",
              "deit_base": "deit_base_patch16_224-b5f2ef4d"}
DEIT_NAMES = (                  # of its weights, and torchvision's for the same, to be replaced in this order
    ("blocks.", "encoder.layers.encoder_layer_"), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."),
    (".attn.qkv.", ".self_attention.in_proj_"), (".attn.proj.", ".self_attention.out_proj."), (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.3."), ("patch_embed.proj.", "conv_proj."), ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"), ("norm.", "encoder.ln."))


def pretrained_weights(backbone, weights):
    """The state dict of a trunk without its ImageNet classifier, in torchvision's naming; None for "none".

    weights: "none"; "imagenet", torchvision's for CNNs (version 1, on which the field's CAMs are made) and DeiT's
    published ones; or the path of a file: a state dict in torchvision's naming or in DeiT's.
    """
    if weights == "none":
        return None
    remedy = "pass --weights FILE with a state dict, imagenet, or none"
    with usage.reading(f"weights {weights} of {backbone}", remedy):
        if weights != "imagenet":
            state = usage.load_checkpoint(weights, remedy)
        elif backbone in DEIT_FILES:
            url = DEIT_WEIGHTS.format(DEIT_FILES[backbone])
            state = torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True)
        else:
            versions = torchvision.models.get_model_weights(backbone)
            state = versions["IMAGENET1K_V1"].get_state_dict(progress=False, check_hash=True)
        state = state.get("model", state)                       # DeiT's files keep the weights under this key
        if "patch_embed.proj.weight" in state:
            for theirs, ours in DEIT_NAMES:
                state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
        return {name.removeprefix("features."): tensor for name, tensor in state.items()
                if not name.startswith(("fc.", "classifier.", "head"))}


# ==== Preparing the data: the toy is drawn, VOC downloaded, COCO's lists and labels put into VOC's layout =============

TOY = Path("data/toy")


def prepare_data(root, download):
    """Make the folder a DataFolder, where we know how."""
    if download:
        with usage.reading(f"PASCAL VOC 2012 into {root}", "fetch VOCtrainval_11-May-2012.tar by hand, unpack it there and "
                           "leave --download out"):
            torchvision.datasets.VOCSegmentation(root, year="2012", image_set="train", download=True)
    if root.resolve() == TOY.resolve():
        draw_toy(root)
    if (root / "annotations/instances_train2014.json").is_file() and not (root / "labels.json").is_file():
        convert_coco(root)


def convert_coco(root):
    """Write MS COCO 2014's classes, lists and labels beside its folders; eval.py draws the masks when it wants them.

    An id is a file name without its ending. The 80 classes stand in the order of COCO's category ids, without its gaps.
    train leaves out images without any object; a crowd is an object like others.
    """
    keep = {"images", "annotations", "categories", "id", "name", "file_name", "image_id", "category_id"}     # no outlines
    print(f"{root}: reading COCO's labels, for the first time", flush=True)
    splits, labels = {}, {}
    for split in ("train", "val"):
        path = root / f"annotations/instances_{split}2014.json"
        with usage.reading(path, "not COCO's instances: fetch it again"):
            table = json.loads(path.read_bytes(), object_hook=lambda entry: {key: entry[key] for key in keep & set(entry)})
            names = {image["id"]: Path(image["file_name"]).stem for image in table["images"]}
            classes = {category["id"]: category["name"] for category in sorted(table["categories"], key=lambda c: c["id"])}
            found = {name: set() for name in names.values()}
            for entry in table["annotations"]:
                found[names[entry["image_id"]]].add(classes[entry["category_id"]])
        splits[split] = [name for name in found if found[name] or split == "val"]
        labels |= {name: sorted(found[name]) for name in splits[split]}
    write_lists(root, splits, classes.values(), labels)


def write_lists(root, splits, classes, labels):
    """Write what a DataFolder reads beside images: {split: ids}, class names and {id: class names}."""
    lists = {f"ImageSets/Segmentation/{split}.txt": ids for split, ids in splits.items()} | {"classes.txt": classes}
    for path, lines in lists.items():
        with usage.written(root / path) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
    usage.write_json(root / "labels.json", labels)                              # the last: its being there means done


TOY_CLASSES = {  # hue of head and body, hue of the glow, ink on the head (u, v in its radii)
    "striped": (0.08, 0.52, lambda u, v: np.sin(8 * u) > 0),
    "spotted": (0.97, 0.17, lambda u, v: np.cos(5 * u) * np.cos(5 * v) > 0.4),
    "ringed": (0.60, 0.03, lambda u, v: np.cos(9 * np.hypot(u, v)) > 0),
    "starred": (0.78, 0.42, lambda u, v: np.hypot(u, v) < 0.55 + 0.3 * np.cos(5 * np.arctan2(v, u))),
    "checked": (0.47, 0.86, lambda u, v: np.sin(5 * u) * np.sin(5 * v) > 0)}


def draw_toy(root, train=800, val=200, side=128):
    """Write the critters once: scenes that tempt classifiers into what the paper reports of their seeds.

    A critter's small patterned head gives its class away; its long body has the class's hue in most critters only, so
    that a CNN may be content with the head. Most lie in a soft glow of the class's, which is not part of them and over
    which a Transformer's seed spreads. Pebbles come in all hues. What networks make of it is in EVIDENCE.md.
    The same pictures on every machine, up to the JPEG library. Returns root; writes nothing if its labels are there.
    """
    if (root / "labels.json").is_file():
        return root
    splits = {split: [f"{split}_{k:04d}" for k in range(count)] for split, count in (("train", train), ("val", val))}
    labels = {}
    for key, names in enumerate(splits.values()):
        for number, name in enumerate(names):
            photo, mask = draw_scene(np.random.default_rng((key, number)), side)
            with usage.written(root / f"JPEGImages/{name}.jpg") as temporary:
                Image.fromarray(photo).save(temporary, quality=95)
            usage.save_mask(root / f"SegmentationClass/{name}.png", mask)
            labels[name] = [c for k, c in enumerate(TOY_CLASSES, start=1) if (mask == k).any()]
    write_lists(root, splits, TOY_CLASSES, labels)
    return root


def draw_scene(rng, side):
    """One toy scene, lengths in units of the side: photograph (side, side, 3) and mask (side, side), uint8."""
    def hsv(*colour):
        return np.float32(colorsys.hsv_to_rgb(*colour))

    def towards(angle):
        return np.stack([np.cos(angle), np.sin(angle)], -1)

    def ball(place, radius, colour, label, pattern=lambda u, v: True):
        box = tuple(slice(max(0, int((p - radius) * fine)), max(0, int((p + radius) * fine) + 1)) for p in place[::-1])
        u, v = (x[:, box[1]] - place[0]) / radius, (y[box[0]] - place[1]) / radius
        part = (u ** 2 + v ** 2 < 1) & pattern(u, v)
        photo[box][part] = (colour * (1.1 - 0.35 * (u ** 2 + v ** 2)[..., None]))[part]
        mask[box][part] = label

    fine = 2 * side                                             # drawn twice as large, for smooth edges
    y = (np.arange(fine, dtype=np.float32)[:, None] + 0.5) / fine
    x = y.T                                                     # (1, fine), y (fine, 1)
    fog = Image.fromarray((rng.random((5, 5)) * 255).astype(np.uint8)).resize((fine, fine), Image.Resampling.BICUBIC)
    dark, light = (hsv(rng.uniform(0.15, 0.4), 0.18, rng.uniform(*values)) for values in ((0.5, 0.8), (0.7, 0.95)))
    photo = dark + (np.asarray(fog, dtype=np.float32)[..., None] / 255) * (light - dark)    # (fine, fine, 3) in [0, 1]
    mask = np.zeros((fine, fine), dtype=np.uint8)

    critters = []
    looks = dict(enumerate(TOY_CLASSES.values(), start=1))
    for label in 1 + rng.permutation(len(TOY_CLASSES))[:rng.choice([1, 2, 3], p=[0.4, 0.45, 0.15])]:
        for _ in range(50):                                     # tries to find a free place
            radius = rng.uniform(0.075, 0.095)                  # of the head
            heading = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.45, 0.45) * np.arange(6)
            joints = rng.uniform(0.1, 0.9, 2) + np.cumsum(1.05 * radius * towards(heading), 0)   # (6, 2), tail first
            if joints.min() > 1.5 * radius and joints.max() < 1 - 1.5 * radius and all(
                    np.linalg.norm(joints[:, None] - others, axis=-1).min() > 1.5 * (radius + other)
                    for _, other, others, _ in critters):
                critters.append((label, radius, joints, heading))
                break
    for label, radius, joints, _ in critters:
        if rng.random() < 0.7:                                  # the glow
            glow = np.max([np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius) ** 2) for px, py in joints[1::2]], 0)
            photo += 0.4 * glow[..., None] * (hsv(looks[label][1], 0.6, 0.95) - photo)
    for _ in range(rng.integers(2, 6)):                         # pebbles
        ball(rng.random(2), rng.uniform(0.03, 0.07), hsv(rng.random(), rng.uniform(0.2, 0.5), rng.uniform(0.5, 0.9)), 0)
    for label, radius, joints, heading in critters:
        hue, _, ink = looks[label]
        value = rng.uniform(0.6, 0.95)
        body = hsv(hue if rng.random() < 0.85 else rng.random(), 0.45, value)
        for turn in (-1.5, 1.5):
            for foot in joints + 1.2 * radius * towards(heading + turn):
                ball(foot, 0.28 * radius, 0.5 * body, label)
        for k, place in enumerate(joints[:-1]):
            ball(place, (0.9 + 0.09 * k) * radius, body * (1 if k % 2 else 0.9), label)
        for turn in (-0.5, 0.5):                                # feelers
            ball(joints[-1] + 1.15 * radius * towards(heading[-1] + turn), 0.2 * radius, 0.4 * body, label)
        ball(joints[-1], radius, hsv(hue, 0.1, 1.0), label)
        ball(joints[-1], 0.9 * radius, hsv(hue, 0.95, 0.6), label, ink)
    photo = photo.clip(0, 1).reshape(side, 2, side, 2, 3).mean((1, 3))
    return (255 * photo).astype(np.uint8), mask[::2, ::2]


if __name__ == "__main__":
    with usage.one_line_errors("run the same command again"):
        main()
