"""Data sets of the hub: the commit that is read, the cache, what is tried again, and what each failure means.

A revision is resolved to a commit once; everything after that goes by the commit. What was read once can be read again
without the hub. Used by sources.py.
"""

import contextlib
import errno
import re
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, SplitsVerificationError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx

from sft import text

RETRY_WAITS = (1, 2, 4, 8, 15, 30, 30)  # seconds between attempts; they outlast an outage of a minute
LONGEST_WAIT = 600  # seconds, if the hub says when to come back (its limits are per five minutes)
RESOLVE_TIMEOUT = 10  # seconds until a hub that doesn't answer cannot be reached

# ==== What is read ====


def load(source):
    """Return (the `datasets.Dataset` of a hub source, or the Path of its one file; its commit, 40 hex digits).

    Raises: whatever the hub's client and `datasets` raise.
    """
    revision, failure = source.revision or "main", None
    if re.fullmatch("[0-9a-f]{40}", revision):
        commit = revision
    else:
        commit, failure = resolve(source, revision)
    rows = load_cached(source, commit)
    if rows is None and failure:
        raise failure
    if rows is None:
        rows = download(source, commit)
    elif failure:
        print(
            f"WARNING: {source.name}: the hub cannot be reached ({diagnose(failure)[1]}). Its {revision} is read from "
            f"the cache, at commit {commit}.",
            file=sys.stderr,
        )
    if commit != revision:
        with contextlib.suppress(OSError):  # a cache may be read-only
            ref_of(source, revision).parent.mkdir(parents=True, exist_ok=True)
            ref_of(source, revision).write_text(commit)
    return rows, commit


def resolve(source, revision):
    """Return (the commit of a branch or tag, None), or (what it was last time, why the hub cannot be reached)."""
    try:
        return huggingface_hub.HfApi().dataset_info(source.hub, revision=revision, timeout=RESOLVE_TIMEOUT).sha, None
    except Exception as error:
        ref = ref_of(source, revision)
        if diagnose(error)[0] not in (OFFLINE, TEMPORARY) or not ref.is_file():
            raise
        return ref.read_text(), error


def ref_of(source, revision):
    """Return the file in the cache where the hub's client, too, keeps the commit of a branch or tag."""
    return caches(source)[0] / "refs" / revision


def download(source, commit):
    """Download a hub source at a commit into the cache and return its rows as `load` does."""
    huggingface_hub.HfApi().dataset_info(source.hub, revision=commit)  # fails more plainly than `datasets` does
    if source.file is not None:
        return Path(huggingface_hub.hf_hub_download(source.hub, source.file, revision=commit, repo_type="dataset"))
    return datasets.load_dataset(
        f"hf://datasets/{source.hub}",  # never a local folder of this name
        name=source.config,
        split=source.split or "train",
        revision=commit,
        cache_dir=str(arrow_cache(source, commit)),
    )


def load_cached(source, commit):
    """Return the rows of a hub source at a commit as `load` does, or None if they aren't in the cache."""
    if source.file is not None:
        path = huggingface_hub.try_to_load_from_cache(source.hub, source.file, revision=commit, repo_type="dataset")
        return Path(path) if isinstance(path, str) else None
    name, folder = source.hub.rpartition("/")[2], str(arrow_cache(source, commit))
    try:
        builder = Cache(folder, name, source.config, version="auto", hash="auto", repo_id=source.hub)
    except (ValueError, FileNotFoundError):  # nothing there, or a kill left a part
        return None
    return builder.as_dataset(split=source.split or "train")


def caches(source):
    """Return where a hub data set is cached: the folder with its files, and the one with the tables made of them."""
    name = f"datasets--{source.hub.replace('/', '--')}"  # as the hub's client calls it
    return Path(huggingface_hub.constants.HF_HUB_CACHE) / name, Path(datasets.config.HF_DATASETS_CACHE) / name


def arrow_cache(source, commit):
    """Return the folder for the tables of one commit and config.

    Each has its own: where `datasets` finds several, it takes the newest whenever the hub fails.
    """
    return caches(source)[1] / commit / (source.config or "default")


# ==== What can fail ====

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: the disk or the quota is full
NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
FREE_DISK = "Free disk space: the hub's cache {home} (HF_HOME) takes a copy."
DELETE = "delete {files} and {tables}"
OFFLINE = (
    "It isn't in the cache yet, and offline mode is on. Unset HF_HUB_OFFLINE, HF_DATASETS_OFFLINE and "
    "TRANSFORMERS_OFFLINE until it is."
)
TEMPORARY = (
    "Check the network, or wait until the hub answers again (https://status.huggingface.co), or download it elsewhere "
    'and give its "path".'
)
OTHER = (
    "Its files have changed, or their copy here is damaged. "
    f'{DELETE.capitalize()} to download them again, name another "revision", or one "file".'
)


def of_class(*classes):
    """Return a function that says whether an exception is one of the classes."""
    return lambda error: isinstance(error, classes)


def has_status(*statuses):
    """Return a function that says whether an exception is an answer of the hub with one of the HTTP statuses."""
    return lambda error: isinstance(error, hub_errors.HfHubHTTPError) and error.response.status_code in statuses


def has_errno(numbers):
    """Return a function that says whether an exception is an OSError with one of the numbers."""
    return lambda error: getattr(error, "errno", None) in numbers


def says(*phrases):
    """Return a function that says whether an exception's text has one of the phrases."""
    return lambda error: any(phrase in str(error) for phrase in phrases)


def is_offline(error):
    """Return whether an exception comes from the offline mode that the user's environment asks for."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE
    return offline and isinstance(error, (ConnectionError, hub_errors.LocalEntryNotFoundError))


FAILURES = [  # (which exceptions, what to do about them): the first that fits one in the chain of causes
    (has_errno(DISK_FULL), FREE_DISK),
    (says("enough disk space"), FREE_DISK),
    (is_offline, OFFLINE),
    (of_class(hub_errors.GatedRepoError), "Accept its terms at {page}, then log in: hf auth login."),
    (of_class(hub_errors.RevisionNotFoundError), 'Correct its "revision", a branch, tag or commit ({page}).'),
    (of_class(hub_errors.RemoteEntryNotFoundError), 'Correct its "file" ({page}/tree/{revision}).'),
    (of_class(hub_errors.HFValidationError), 'Correct its "hub", OWNER/NAME.'),
    (
        of_class(hub_errors.RepositoryNotFoundError),
        'Correct its "hub"; if it is private or gated, ask for access at {page} and log in: hf auth login.',
    ),
    (
        has_status(401, 403),
        "The hub or a proxy before it refuses this. Log in (hf auth login), ask for access at {page}, or download it "
        'elsewhere and give its "path".',
    ),
    (has_status(408, 429, *range(500, 600)), TEMPORARY),
    (of_class(httpx.TransportError, ConnectionError, TimeoutError, hub_errors.XetDownloadError), TEMPORARY),
    (has_errno(NO_RIGHTS), "Get the right to write to the hub's cache {home}, or set HF_HOME to another folder."),
    (of_class(hub_errors.LocalEntryNotFoundError), TEMPORARY),
    (says("LocalEntryNotFoundError", "Consistency check failed"), TEMPORARY),  # `datasets` leaves out the cause
    (says("BuilderConfig", "Config name is missing"), 'Correct its "config".'),
    (says("Unknown split"), 'Correct its "split".'),
    (
        of_class(DataFilesNotFoundError, EmptyDatasetError),
        'It has no files that `datasets` can read. Name one "file" of it ({page}).',
    ),
    (
        of_class(SplitsVerificationError),
        "Its README.md disagrees with its files: it has changed, or their copy here is damaged. "
        f'{DELETE.capitalize()} to download them again, or name another "revision".',
    ),
]


def diagnose(error):
    """Return (its remedy in FAILURES or OTHER, what failed as one line, seconds to wait that the hub asks for or 0)."""
    chain = [error]
    while True:
        last = chain[-1]
        cause = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if cause is None or cause in chain:
            break
        chain.append(cause)
    remedy, shown = OTHER, chain[-1]
    for fits, found in FAILURES:
        fitting = [one for one in chain if fits(one)]
        if fitting:
            remedy, shown = found, fitting[0]
            break
    wait = 0
    for one in chain:
        if isinstance(one, hub_errors.HfHubHTTPError):
            seconds = one.response.headers.get("Retry-After", "")
            wait = min(int(seconds), LONGEST_WAIT) if seconds.isdecimal() else wait
    return remedy, f"{type(shown).__name__}: {text.one_line(str(shown))[:300].rstrip('.')}", wait


def fetch(source):
    """Return what `load` does; what may pass by itself is tried again after RETRY_WAITS.

    Raises: SystemExit, with the source, what failed and the remedy.
    """
    print(f"{source.name}: fetching {source.hub}", flush=True)
    for wait in (*RETRY_WAITS, None):
        try:
            return load(source)
        except Exception as error:  # the hub's client, `datasets` and pyarrow each raise their own
            remedy, problem, asked = diagnose(error)
        if remedy is not TEMPORARY or wait is None:
            break
        wait = max(wait, asked)
        print(f"WARNING: {source.name}: {problem}. The next attempt is in {wait} s.", file=sys.stderr)
        time.sleep(wait)
    raise refusal(source, problem, remedy)


def refusal(source, problem, remedy):
    """Return the SystemExit for a source that cannot be read."""
    names = {"home": huggingface_hub.constants.HF_HOME}
    if source.hub is not None:
        names["files"], names["tables"] = caches(source)
        names["page"] = f"{huggingface_hub.constants.ENDPOINT}/datasets/{source.hub}"
        names["revision"] = source.revision or "main"
        remedy += " The same command continues where it stopped; downloaded files are kept."
    return SystemExit(f"{source.name}: {source.location} cannot be read ({problem}). {remedy.format(**names)}")
