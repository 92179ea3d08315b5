"""The process in which a student's functions run: arrays in, arrays out.

It knows nothing of right answers. Each line of standard input is a call, each line of the reply
pipe its result, both JSON; whatever the student's code prints goes nowhere.

    {"module", "name", "args": [value …], "grad": [places of args], "pull": output}
    → {"value", "grads": [value …], "changed": whether an argument was written to} or {"error": …}

Run as `python -I -c SOURCE FOLDER`, so that no file of the grader needs to be readable.
"""
import importlib
import json
import os
import sys
import traceback

MOST_ELEMENTS = 1_000_000


def encode(value):
    """A tensor, number, bool, None, list or tuple as JSON; of anything else its type's name."""
    import torch
    if isinstance(value, torch.Tensor):
        if value.numel() > MOST_ELEMENTS:
            return {"other": f"a tensor of {value.numel():,} numbers"}
        kind = str(value.dtype).removeprefix("torch.")
        return {"tensor": value.detach().cpu().flatten().tolist(), "shape": list(value.shape),
                "dtype": kind}
    if isinstance(value, (list, tuple)):
        return {"list": [encode(one) for one in value]}
    if value is None or isinstance(value, (bool, int, float, str, dict)):
        return {"plain": value}
    return {"other": type(value).__name__}


def decode(value, depth: int = 0):
    """What `encode` made; None for a value of another type, or of a size or depth that no right
    answer has."""
    import torch
    if "tensor" in value:
        places = 1
        for size in value["shape"]:
            places *= max(1, size)                   # (10^9, 0) holds no number, but many lists
        if places > MOST_ELEMENTS:
            return None
        kind = getattr(torch, value["dtype"])
        return torch.tensor(value["tensor"], dtype=kind).reshape(value["shape"])
    if "list" in value:
        return [decode(one, depth + 1) for one in value["list"]] if depth < 4 else None
    found = value.get("plain")
    return None if isinstance(found, int) and abs(found) > 2 ** 53 else found


def call(function, args: list, grad: list[int], pull: int | None = None) -> dict:
    """Call a function; and the gradients, for args[i], i in grad, of the sum of output `pull`; or,
    if that is None, of Σ w·out over all outputs, w = 1 + ½ sin 1, 1 + ½ sin 2, …: weights that no
    two places share."""
    import torch
    args = [arg.clone().requires_grad_() if place in grad else arg
            for place, arg in enumerate(args)]
    before = [arg.detach().clone() if isinstance(arg, torch.Tensor) else None for arg in args]
    value = function(*args)
    outputs = value if isinstance(value, (list, tuple)) else [value]
    outputs, uneven = (outputs, 0.5) if pull is None else (outputs[pull:pull + 1], 0.0)
    pulled = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
    grads: list = [None] * len(grad)
    if grad and pulled:
        total = sum((out * (1 + uneven * torch.arange(1, out.numel() + 1, dtype=out.dtype).sin()
                            ).reshape(out.shape)).sum() for out in pulled)
        grads = torch.autograd.grad(total, [args[i] for i in grad], allow_unused=True)
    changed = any(old is not None and not torch.equal(old.nan_to_num(7.0), arg.nan_to_num(7.0))
                  for old, arg in zip(before, args))
    return {"value": encode(value), "grads": [encode(one) for one in grads], "changed": changed}


def find(module: str, name: str):
    """The function, or the method of a Tinytown tokenizer."""
    found = importlib.import_module(module)
    owner, _, method = name.rpartition(".")
    return getattr(getattr(found, owner)("tinytown") if owner else found, method)


def said(error: BaseException, folder: str) -> str:
    """An error as one line, with the last line of the student's files that it went through: its
    text, as its number may differ there."""
    if isinstance(error, SystemExit):
        text = "the code called sys.exit"
    elif isinstance(error, SyntaxError):
        return f"{os.path.basename(error.filename or '')}, line {error.lineno}: {error.msg}"
    else:
        lines = str(error).splitlines()
        text = f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")
    place = [f"{os.path.relpath(frame.filename, folder)}, `{frame.line}`"
             for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename.startswith(folder)]
    return f"{place[-1]}: {text}" if place else text


def serve(folder: str) -> None:
    """Answer calls until there are no more."""
    calls, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    import torch
    torch.set_num_threads(1)
    replies.write("ready\n")
    replies.flush()
    for line in calls:
        try:
            asked = json.loads(line)
            function = find(asked["module"], asked["name"])
            reply = json.dumps(call(function, list(map(decode, asked["args"])), asked["grad"],
                                    asked["pull"]))
        except BaseException as error:       # sys.exit and the like end no grading
            reply = json.dumps({"error": said(error, folder)})
        replies.write(reply + "\n")
        replies.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
