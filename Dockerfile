# The image of every pod: gateways, supervisor, workers, and Ray as KubeRay starts it. `make image` builds it, and
# docs/image.md has the arguments. What seldom changes comes first: a change of code makes the last two layers anew.

# Debian 12 or anything with apt and Python 3.11. A build that can be repeated names a digest: debian@sha256:...
ARG BASE=debian:bookworm-slim


# --- What the image has of Debian. KubeRay's probes need bash and wget. ---
FROM ${BASE} AS system
RUN export DEBIAN_FRONTEND=noninteractive \
 && apt-get update \
 && apt-get install --yes --no-install-recommends bash ca-certificates libstdc++6 python3 wget \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/* /var/cache/ldconfig/* /var/log/apt /var/log/*.log \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
# Folders of the user are the only ones that it can write to; a read-only container mounts a volume there.
COPY image/profile.sh /etc/profile.d/isthmus.sh
RUN groupadd --gid 1000 isthmus \
 && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /home/isthmus --shell /bin/bash isthmus \
 && install --directory --owner 1000 --group 1000 --mode 0700 /home/isthmus


# --- A compiler and pip, of which nothing reaches the image ---
FROM system AS tools
RUN export DEBIAN_FRONTEND=noninteractive \
 && apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY image/tools.txt /build/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/tools \
 && /opt/tools/bin/pip install --no-cache-dir --requirement /build/tools.txt


# --- The names of what the project depends on: by these alone the next stage is kept or made anew ---
FROM tools AS requirements
COPY pyproject.toml /build/
RUN python3 -c 'import tomllib; project = tomllib.load(open("/build/pyproject.toml", "rb"))["project"]; \
extras = project["optional-dependencies"]; \
print(*project["dependencies"], *extras["postgres"], *extras["kuberay"], sep="\n")' >/build/requirements.txt


# --- /opt/isthmus: a virtual environment without pip ---
FROM tools AS dependencies
# A file of constraints, constraints-cpu.txt for one; without it pip finds what fits.
ARG CONSTRAINTS=
# A package index to look at too: that of PyTorch's builds for CPUs. PyPI has those for CUDA.
ARG TORCH_INDEX=
COPY constraints*.txt /build/
COPY --from=requirements /build/requirements.txt /build/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/isthmus \
 && /opt/tools/bin/pip --python /opt/isthmus install --no-cache-dir --only-binary :all: \
      ${CONSTRAINTS:+--constraint /build/$CONSTRAINTS} ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} \
      --requirement /build/requirements.txt
COPY image/triton_driver.py image/cc /build/
RUN /opt/isthmus/bin/python /build/triton_driver.py /opt/isthmus/libexec \
 && install /build/cc /opt/isthmus/libexec/cc


# --- A small model for `isthmus demo`, where the build is told its package ---
FROM tools AS weights
ARG DEMO_WEIGHTS=
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    mkdir /weights \
 && if [ -n "$DEMO_WEIGHTS" ]; then \
      python3 -m venv --without-pip /opt/isthmus \
      && /opt/tools/bin/pip --python /opt/isthmus install --no-cache-dir --only-binary :all: --no-deps \
           --prefix /weights "$DEMO_WEIGHTS"; \
    fi


# --- The project, and the list of all that is installed ---
FROM dependencies AS project
COPY --from=weights /weights /weights
COPY . /source
RUN /opt/tools/bin/pip --no-cache-dir wheel --no-index --no-deps --no-build-isolation --wheel-dir /build /source \
 && /opt/tools/bin/pip --python /opt/isthmus install --no-cache-dir --no-index --no-deps \
      --prefix /project /build/isthmus-*.whl \
 && PYTHONPATH=$(echo /project/lib/python3*/site-packages):$(echo /weights/lib/python3*/site-packages) \
    /opt/tools/bin/cyclonedx-py environment --output-reproducible --output-format JSON --output-file /build/sbom.json \
      /opt/isthmus/bin/python


FROM system
COPY --from=dependencies /opt/isthmus /opt/isthmus
COPY --from=weights /weights /opt/isthmus
COPY --from=project /project /opt/isthmus
COPY --from=project /build/sbom.json /usr/share/doc/isthmus/sbom.cdx.json

# CC: what Triton asks for its compiled driver. Which GPUs a container sees is left to who starts it.
ENV PATH=/opt/isthmus/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/home/isthmus \
    CC=/opt/isthmus/libexec/cc \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/isthmus
ENTRYPOINT ["isthmus"]
CMD ["--help"]

ARG BASE
ARG VERSION=
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="isthmus" \
      org.opencontainers.image.description="Disaggregated prefill/decode inference: compressed KV pages over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"
