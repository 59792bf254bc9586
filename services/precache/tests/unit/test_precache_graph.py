"""The graph of a swarm: symmetric, connected, near-regular, mostly inside racks, and stable."""

from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.swarming.graph import DEGREE, Graph

HOSTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=4), st.sampled_from(["r1", "r2", None]), max_size=60
)


def graph_of(hosts: dict[str, str | None], key: str = "swarm") -> Graph:
    graph = Graph(key)
    for host, rack in hosts.items():
        graph.add(host, rack)
    return graph


@given(HOSTS)
def test_being_neighbours_is_symmetric_and_nobody_is_its_own(
    hosts: dict[str, str | None],
) -> None:
    graph = graph_of(hosts)
    for host in hosts:
        found = graph.neighbours(host)
        assert host not in found
        assert all(host in graph.neighbours(other) for other in found)


@given(HOSTS)
def test_every_host_is_reached_from_every_other(hosts: dict[str, str | None]) -> None:
    graph = graph_of(hosts)
    reached: set[str] = set()
    waiting = sorted(hosts)[:1]
    while waiting:
        host = waiting.pop()
        if host not in reached:
            reached.add(host)
            waiting += graph.neighbours(host)
    assert reached == set(hosts)


@given(HOSTS, st.data())
def test_joining_and_leaving_in_any_order_ends_in_the_same_graph(
    hosts: dict[str, str | None], data: st.DataObject
) -> None:
    graph = graph_of(hosts)
    names = sorted(hosts)
    for host in data.draw(st.permutations(names)):
        graph.remove(host)
    assert len(graph) == 0
    for host in data.draw(st.permutations(names)):
        graph.add(host, "elsewhere")
        graph.add(host, hosts[host])
    fresh = graph_of(hosts)
    assert {host: graph.neighbours(host) for host in hosts} == {
        host: fresh.neighbours(host) for host in hosts
    }


def test_nobody_has_many_more_neighbours_than_the_degree() -> None:
    graph = graph_of({f"host-{number}": None for number in range(1000)})
    degrees = [len(graph.neighbours(f"host-{number}")) for number in range(1000)]
    assert max(degrees) <= DEGREE
    assert min(degrees) >= DEGREE - 4


def test_most_edges_stay_inside_the_rack_and_some_leave_it() -> None:
    hosts: dict[str, str | None] = {f"host-{n}": f"rack-{n % 8}" for n in range(160)}
    graph = graph_of(hosts)
    edges = [(host, other) for host in hosts for other in graph.neighbours(host)]
    outside = sum(hosts[host] != hosts[other] for host, other in edges)
    assert 0.05 < outside / len(edges) < 0.25


def test_a_host_that_leaves_changes_only_its_neighbours_lists() -> None:
    graph = graph_of({f"host-{number}": None for number in range(200)})
    before = {f"host-{n}": graph.neighbours(f"host-{n}") for n in range(200)}
    graph.remove("host-7")
    changed = {
        host for host in before if host != "host-7" and graph.neighbours(host) != before[host]
    }
    assert changed == set(before["host-7"])


def test_two_swarms_of_the_same_hosts_have_different_graphs() -> None:
    hosts: dict[str, str | None] = {f"host-{number}": None for number in range(100)}
    one, other = graph_of(hosts), graph_of(hosts, key="another swarm")
    assert any(one.neighbours(host) != other.neighbours(host) for host in hosts)
