"""Serves the rewards of this repository to `--reward http://HOST:PORT/NAME`; put a large judge of yours in their place.

python -m docs.reward_server hps                           on the machine with the judge; port 8000
python -m docs.reward_server hps 8001 hps=tiny/hps         another port, weights from a folder
torchrun grpo_flux.py --reward http://HOST:8000/hps        on the machine that trains
"""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from rewards import load_reward, parse_paths


def serve(spec: str, port: int, paths: dict[str, str]) -> HTTPServer:
    """A server that has loaded the rewards of `spec`. It answers when its serve_forever() runs."""
    reward = load_reward(spec, paths, "cuda" if torch.cuda.is_available() else "cpu")

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            name = self.path.split("/")[-1]
            if name not in reward.weights:
                return self.send_error(404, f"this server has {', '.join(reward.weights)}")
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            visuals = [picture(x) for x in asked.get("images", [])]
            visuals += [torch.stack([picture(frame) for frame in video]) for video in asked.get("videos", [])]
            scores = reward(torch.stack(visuals), asked["prompts"], asked.get("fps"))[name]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": scores.tolist()}).encode())

        def do_GET(self):  # a run asks whether anyone is there
            self.send_error(405)

    HTTPServer.request_queue_size = 256  # all processes of a run may ask at once; they are answered one by one
    return HTTPServer(("", port), Judge)


def picture(png: str) -> torch.Tensor:
    """A PNG file in base64 → (3, H, W) in [0, 1]."""
    return to_tensor(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


if __name__ == "__main__":
    spec, port, paths = (*sys.argv[1:], *("hps", "8000", "")[len(sys.argv) - 1 :])
    serve(spec, int(port), parse_paths(paths)).serve_forever()
