# CPU and, with `docker run --gpus all`, CUDA:
#   docker build -t pt2onnx .
# CPU only, a fraction of the size:
#   docker build -t pt2onnx:cpu --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
# Builds with the classic builder as well as with BuildKit, so there is no syntax that only one of them knows.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# The pins of what is large, in a file of their own: its layer below is rebuilt only when one of these changes.
FROM ${BASE_IMAGE} AS pins
COPY requirements.txt /
RUN grep -E '^(torch|torchvision|numpy)==' /requirements.txt >/large.txt

FROM ${BASE_IMAGE}

# pip prefers a version such as 2.14.1+cpu, which only PyTorch's own index has, to 2.14.1.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /app

# The dependencies before the code: an edit of convert.py then rebuilds in seconds.
COPY --from=pins /large.txt ./
RUN pip install --no-cache-dir -r large.txt
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

COPY convert.py architectures.json.xz entrypoint.sh ./

# No telemetry, no bytecode in a read-only image, caches where any user may write, and of the GPU what computing needs.
ENV ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ARG SOURCE=
ARG LICENSES=NOASSERTION
LABEL org.opencontainers.image.title="pt2onnx" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.description="A PyTorch model in, a verified ONNX model out" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="${LICENSES}"

USER 1000:1000
ENTRYPOINT ["/app/entrypoint.sh"]
