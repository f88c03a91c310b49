"""The network of one Kubernetes node, in the network namespace of this process: pods, Services, NetworkPolicies.

Every pod is a network namespace with one address, whose only neighbour is the node (a veth pair, a route of its own, as
Calico does it): all that pods say to each other passes through the node's nftables. There a Service's address becomes
that of one of its ready pods (chain `services`, as kube-proxy), and policies are kept (`policies.py`). The node itself
reaches every pod, as a kubelet does for its probes. No other network is attached.
"""

import ipaddress
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .objects import NAMESPACE, Object, port_number
from .policies import policy_rules

PODS, SERVICES = ipaddress.ip_network("10.244.0.0/24"), ipaddress.ip_network("10.96.0.0/24")
NODE = "169.254.1.1"  # the neighbour of every pod


@dataclass(eq=False)
class Endpoint:
    """A pod on the network."""

    pod: Object
    address: str
    link: str  # the node's end
    ready: bool = False

    @property
    def name(self) -> str:
        return self.pod["metadata"]["name"]

    @property
    def labels(self) -> dict[str, str]:
        return self.pod["metadata"].get("labels") or {}


@dataclass
class Network:
    """`hosts` is the file that every pod has as /etc/hosts: names of Services, and of pods."""

    hosts: Path
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    services: list[Object] = field(default_factory=list)
    policies: list[Object] = field(default_factory=list)
    _given: int = 0
    _addresses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = Path("/proc/sys/net/ipv4")
        (settings / "ip_forward").write_text("1")
        (settings / "icmp_ratelimit").write_text("0")  # each refusal is told
        self.hosts.touch()
        self.renew()

    def attach(self, pod: Object) -> Endpoint:
        """A network namespace of the pod's name with an address that no pod had before."""
        self._given += 1
        name, link = pod["metadata"]["name"], f"pod{self._given}"
        endpoint = Endpoint(pod, str(PODS[self._given + 9]), link)
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("addr", "add", f"{NODE}/32", "dev", link)
        _ip("link", "set", link, "up")
        _ip("route", "add", f"{endpoint.address}/32", "dev", link)
        inside = ("-n", name)
        _ip(*inside, "addr", "add", f"{endpoint.address}/32", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip(*inside, "link", "set", device, "up")
        _ip(*inside, "route", "add", NODE, "dev", "eth0", "scope", "link")
        _ip(*inside, "route", "add", "default", "via", NODE, "dev", "eth0")
        self.endpoints[name] = endpoint
        self.renew()
        return endpoint

    def detach(self, name: str) -> None:
        endpoint = self.endpoints.pop(name)
        _ip("link", "del", endpoint.link)
        _ip("netns", "del", name)
        self.renew()

    def set_ready(self, name: str, ready: bool) -> None:
        if (endpoint := self.endpoints.get(name)) and endpoint.ready is not ready:
            endpoint.ready = ready
            self.renew()

    def address(self, service: Object) -> str | None:
        """A Service's own address; None for a headless one."""
        if service["spec"].get("clusterIP") == "None":
            return None
        name = service["metadata"]["name"]
        return self._addresses.setdefault(name, str(SERVICES[len(self._addresses) + 10]))

    def behind(self, service: Object) -> list[Endpoint]:
        """The pods that get what is sent to a Service."""
        selector, early = service["spec"].get("selector"), service["spec"].get("publishNotReadyAddresses")
        if not selector:
            return []
        chosen = [end for end in self.endpoints.values() if selector.items() <= end.labels.items()]
        return [endpoint for endpoint in chosen if early or endpoint.ready]

    def renew(self) -> None:
        """Names and rules as they follow from what is there now; nftables puts all rules in at once."""
        # In place: the file is mounted into pods.
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{line}\n" for line in self._names()))
        rules = [
            "add table inet node",
            "delete table inet node",
            "table inet node {",
            *self._service_rules(),
            *policy_rules(self.policies, list(self.endpoints.values())),
            "}",
        ]
        subprocess.run(["nft", "-f", "-"], input="\n".join(rules) + "\n", text=True, check=True)

    def _names(self) -> list[str]:
        lines = []
        for service in self.services:
            name, own = service["metadata"]["name"], self.address(service)
            names = " ".join(
                f"{name}{end}" for end in (f".{NAMESPACE}.svc.cluster.local", f".{NAMESPACE}.svc", f".{NAMESPACE}", "")
            )
            addresses = [own] if own else [endpoint.address for endpoint in self.behind(service)]
            lines += [f"{address} {names}" for address in addresses]
        return lines + [f"{endpoint.address} {name}" for name, endpoint in self.endpoints.items()]

    def _service_rules(self) -> list[str]:
        rules = []
        for service in self.services:
            address = self.address(service)
            for port in service["spec"]["ports"] if address else ():
                ends = self.behind(service)
                before = f"ip daddr {address} tcp dport {port['port']}"
                if ends:
                    (target,) = {port_number(port.get("targetPort", port["port"]), end.pod) for end in ends}
                    turns = ", ".join(f"{turn} : {end.address}" for turn, end in enumerate(ends))
                    rules.append(f"{before} dnat ip to numgen inc mod {len(ends)} map {{ {turns} }}:{target}")
        return [
            *("chain services {", "type nat hook prerouting priority dstnat", *rules, "}"),
            # A Service without a ready pod refuses.
            *("chain lost {", "type filter hook prerouting priority filter", f"ip daddr {SERVICES} reject", "}"),
        ]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
