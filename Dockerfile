# slrmerge with the CPU build of torch: docker build -t slrmerge . && docker run --rm -v "$PWD:/work" slrmerge recipe.yaml --out hybrid
# Checkpoints on the Hub are cached in /cache: add -v ~/.cache/huggingface:/cache to keep them.
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY slrmerge slrmerge
RUN python -m venv /opt/slrmerge \
 && /opt/slrmerge/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
 && /opt/slrmerge/bin/pip install --no-cache-dir '.[search,eval]'

FROM python:3.13-slim
COPY --from=build /opt/slrmerge /opt/slrmerge
ENV PATH=/opt/slrmerge/bin:$PATH HF_HOME=/cache
RUN mkdir --mode=1777 /cache
WORKDIR /work
ENTRYPOINT ["slrmerge"]
CMD ["--help"]
