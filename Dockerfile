# PT2ONNX: docker run -v /path/to/models:/input -v /path/to/output:/output pt2onnx -i /input/model.pt -o /output/model.onnx
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="pt2onnx" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.description="A PyTorch model in, a verified ONNX model out"

WORKDIR /app

# The dependencies first: an edit of convert.py then rebuilds in seconds.
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

COPY convert.py architectures.json.xz entrypoint.sh ./

# No telemetry, no bytecode in a read-only image, and caches where any user may write.
ENV ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp

USER 1000:1000
ENTRYPOINT ["/app/entrypoint.sh"]
