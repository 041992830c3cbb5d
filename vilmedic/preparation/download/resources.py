"""Reader of the resource table, `data/resources.yml`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vilmedic.config.load import read_as
from vilmedic.errors import ConfigError, nearest


@dataclass(frozen=True)
class Account:
    """Login source of a server.

    Attributes:
        host: the server; they are sent to no other.
        username: environment variable of the user.
        password: environment variable of the password.
        page: where one signs up.
        user_agent: what the server wants to be addressed with; empty for the plain truth.
    """

    host: str
    username: str
    password: str
    page: str
    user_agent: str = ""


@dataclass(frozen=True)
class File:
    """A file to fetch.

    Attributes:
        url: where it is.
        path: where it goes, in the data folder.
        bytes: its size, where published.
        sha256: its sum, where published.
        sums: URL of a list of sums that has it.
    """

    url: str
    path: str
    bytes: int | None = None
    sha256: str | None = None
    sums: str | None = None


@dataclass(frozen=True)
class Images:
    """The images of MIMIC-CXR-JPG, each made smaller as it arrives.

    Attributes:
        base: URL that their paths start from.
        sums: URL of the list of their sums.
        split: path of the table that lists them, in the data folder.
        originals: folder of the originals, in the data folder.
        short_side: pixels of the short side.
        quality: of the JPEG files written.
        bytes_each: of an original, on average.
        kept_each: of an image written, on average.
    """

    base: str
    sums: str
    split: str
    originals: str
    short_side: int = 512
    quality: int = 95
    bytes_each: int = 1_500_000
    kept_each: int = 100_000


@dataclass(frozen=True)
class Unpack:
    """An archive, or a folder that the user filled, whose images are made smaller.

    Attributes:
        archive: path of the archive in the data folder; empty when the images lie there already.
        folder: folder of the originals, in the data folder.
        suffix: `.jpg` or `.png`.
        short_side: pixels of the short side.
        quality: of JPEG files.
        bytes: space that the unpacked originals take.
        kept_bytes: space that the images written take.
    """

    folder: str
    archive: str = ""
    suffix: str = ".jpg"
    short_side: int = 512
    quality: int = 95
    bytes: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True)
class Expected:
    """Files that the user has to provide, as they require registration.

    Attributes:
        path: where it must lie, in the data folder; `*` stands for anything, `**` for folders at
            any depth, also behind links.
        what: what it is.
    """

    path: str
    what: str


@dataclass(frozen=True)
class HubModel:
    """A model of the hub.

    Attributes:
        repo: its name.
        path: folder it goes to, in the data folder.
        patterns: files to take; empty for all.
        bytes: space that they take.
    """

    repo: str
    path: str
    patterns: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True)
class Resource:
    """Something that can be asked for by name.

    Attributes:
        what: what it is.
        size: how much there is to fetch, in words.
        terms: under which terms.
        target: where the result goes, in the data folder.
        page: its web page.
        account: the account it needs, by name.
        files: to fetch.
        images: to fetch and make smaller one by one.
        models: of the hub.
        expected: what the user puts in place.
        unpack: what to make smaller afterwards.
        after: scripts of the data folder to run afterwards, each with its arguments.
        subset_after: arguments that these get in addition when only a subset was fetched.
    """

    what: str
    size: str
    terms: str
    target: str
    page: str = ""
    account: str = ""
    files: tuple[File, ...] = ()
    images: Images | None = None
    models: tuple[HubModel, ...] = ()
    expected: tuple[Expected, ...] = ()
    unpack: Unpack | None = None
    after: tuple[tuple[str, ...], ...] = ()
    subset_after: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResourceTable:
    """All that can be fetched.

    Attributes:
        resources: by name, in the order of the file.
        accounts: by name.
    """

    resources: dict[str, Resource]
    accounts: dict[str, Account] = field(default_factory=dict)

    def pick(self, names: list[str]) -> dict[str, Resource]:
        """The resources of some names.

        Raises:
            ConfigError: there is none of that name.
        """
        for name in names:
            if name not in self.resources:
                raise ConfigError(
                    f"There is nothing called '{name}' to fetch. There are "
                    f"{', '.join(self.resources)}.{nearest(name, self.resources)}"
                )
        return {name: self.resources[name] for name in names}


def load_table(path: Path) -> ResourceTable:
    """Read the table of resources.

    Raises:
        ConfigError: it cannot be read, or holds what it should not; every place is named.
    """
    table, tree = read_as(ResourceTable, path)
    known = table.accounts
    wrong = [
        f"{tree.where(('resources', name, 'account'))}: given '{resource.account}'; allowed: "
        f"{', '.join(known) or 'none'}.{nearest(resource.account, known)}"
        for name, resource in table.resources.items()
        if resource.account and resource.account not in known
    ]
    if wrong:
        raise ConfigError(wrong)
    return table
