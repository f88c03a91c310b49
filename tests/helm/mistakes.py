"""Mistakes that somebody could make in the chart: each changes rendered objects, and says what the rules must find."""

from collections.abc import Callable
from dataclasses import dataclass

from .charts import Object, only


@dataclass(frozen=True)
class Mistake:
    """What is changed in the objects of `case`, and a part of the problem that follows."""

    change: Callable[[list[Object]], object]
    found: str
    case: str = "production"

    @property
    def name(self) -> str:
        return self.change.__name__


MISTAKES: list[Mistake] = []


def finds(found: str, case: str = "production") -> Callable[[Callable[[list[Object]], object]], object]:
    """Lists a function as a mistake."""

    def listed(change: Callable[[list[Object]], object]) -> object:
        MISTAKES.append(Mistake(change, found, case))
        return change

    return listed


def ray(objects: list[Object]) -> Object:
    return only(objects, "RayCluster")["spec"]


def head(objects: list[Object]) -> Object:
    return ray(objects)["headGroupSpec"]["template"]["spec"]


def supervisor(objects: list[Object]) -> Object:
    return head(objects)["initContainers"][0]


def group(objects: list[Object], number: int = 0) -> Object:
    return ray(objects)["workerGroupSpecs"][number]


def pod(objects: list[Object], number: int = 0) -> Object:
    return group(objects, number)["template"]["spec"]


def worker(objects: list[Object], number: int = 0) -> Object:
    return pod(objects, number)["containers"][0]


def gateway(objects: list[Object]) -> Object:
    return only(objects, "Deployment")["spec"]["template"]["spec"]


def budget(objects: list[Object], role: str) -> Object:
    return only(objects, "PodDisruptionBudget", role)["spec"]


def policy(objects: list[Object], name: str) -> Object:
    return only(objects, "NetworkPolicy", name)["spec"]


def variable(container: Object, name: str) -> Object:
    return next(entry for entry in container["env"] if entry["name"] == name)


# --- the thirteen lessons of a real cluster ---


@finds("only a number in minAvailable works")
def a_budget_of_ray_pods_is_a_share(objects: list[Object]) -> None:
    budget(objects, "decode")["minAvailable"] = "50%"


@finds("only a number in minAvailable works")
def a_budget_of_ray_pods_is_max_unavailable(objects: list[Object]) -> None:
    found = budget(objects, "decode")
    del found["minAvailable"]
    found["maxUnavailable"] = 1


@finds("blocks every eviction")
def a_budget_wants_all_pods(objects: list[Object]) -> None:
    budget(objects, "decode")["minAvailable"] = 4


@finds("only a Deployment has a scale here")
def an_autoscaler_aims_at_the_ray_cluster(objects: list[Object]) -> None:
    only(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"] = {"kind": "RayCluster", "name": "prod-isthmus"}


@finds("automountServiceAccountToken is False, needed: True")
def the_autoscaler_has_no_token(objects: list[Object]) -> None:
    head(objects)["automountServiceAccountToken"] = False


@finds("automountServiceAccountToken is True, needed: False")
def a_worker_has_a_token(objects: list[Object]) -> None:
    pod(objects)["automountServiceAccountToken"] = True


@finds("automountServiceAccountToken is True, needed: False", case="no-autoscaling")
def a_head_without_autoscaler_has_a_token(objects: list[Object]) -> None:
    head(objects)["automountServiceAccountToken"] = True


@finds("groups begin with")
def a_new_group_comes_first(objects: list[Object]) -> None:
    ray(objects)["workerGroupSpecs"].reverse()


@finds("upgradeStrategy Recreate")
def an_upgrade_ends_all_pods(objects: list[Object]) -> None:
    ray(objects)["upgradeStrategy"]["type"] = "Recreate"


@finds("no DNS label of up to 40")
def the_name_is_too_long(objects: list[Object]) -> None:
    only(objects, "RayCluster")["metadata"]["name"] = "a" * 41


@finds("in single quotes")
def resources_are_json_without_quotes(objects: list[Object]) -> None:
    group(objects)["rayStartParams"]["resources"] = '{"prefill": 1}'


@finds("in single quotes")
def two_workers_fit_a_pod(objects: list[Object]) -> None:
    group(objects)["rayStartParams"]["resources"] = "'{\"prefill\": 2}'"


@finds("in single quotes")
def a_group_has_the_resource_of_the_other_role(objects: list[Object]) -> None:
    group(objects)["rayStartParams"]["resources"] = "'{\"decode\": 1}'"


@finds("resources are said twice")
def resources_are_said_twice(objects: list[Object]) -> None:
    group(objects)["resources"] = {"CPU": "8"}


@finds("authOptions.mode is not token")
def ray_asks_for_no_token(objects: list[Object]) -> None:
    del ray(objects)["authOptions"]


@finds("rayVersion does not say")
def the_version_has_no_token_authentication(objects: list[Object]) -> None:
    ray(objects)["rayVersion"] = "2.51.0"


@finds("the autoscaler is not v2")
def the_autoscaler_is_the_old_one(objects: list[Object]) -> None:
    ray(objects)["autoscalerOptions"]["version"] = "v1"


@finds("restartPolicy is not Never")
def a_worker_is_started_again_in_place(objects: list[Object]) -> None:
    pod(objects)["restartPolicy"] = "Always"


@finds("alpha feature")
def an_alpha_feature_is_on(objects: list[Object]) -> None:
    ray(objects)["tlsOptions"] = {"enabled": True}


@finds("would be killed")
def liveness_asks_whether_it_can_serve(objects: list[Object]) -> None:
    worker(objects)["livenessProbe"] = {"grpc": {"port": 50062}}


@finds("which a process that hangs takes too")
def liveness_only_connects(objects: list[Object]) -> None:
    gateway(objects)["containers"][0]["livenessProbe"] = {"tcpSocket": {"port": "health"}}


@finds("would be killed")
def liveness_of_the_supervisor_looks_at_the_model(objects: list[Object]) -> None:
    supervisor(objects)["livenessProbe"] = {"grpc": {"port": 50055}}


@finds("where nothing listens")
def a_probe_asks_another_port(objects: list[Object]) -> None:
    gateway(objects)["containers"][0]["readinessProbe"]["grpc"]["port"] = 50055


@finds("preStop stops Ray")
def pre_stop_stops_ray(objects: list[Object]) -> None:
    worker(objects)["lifecycle"]["preStop"]["exec"]["command"] = ["bash", "-c", "ray stop"]


@finds("preStop does not drain")
def nothing_drains_a_worker(objects: list[Object]) -> None:
    del worker(objects, 1)["lifecycle"]


@finds("is less than its drain takes")
def the_grace_is_that_of_kubernetes(objects: list[Object]) -> None:
    del pod(objects, 1)["terminationGracePeriodSeconds"]


@finds("is less than its drain takes")
def the_grace_forgets_what_ray_waits_for(objects: list[Object]) -> None:
    variable(worker(objects, 1), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")["value"] = "300"


@finds("is less than its drain takes")
def a_gateway_has_less_time_than_it_drains(objects: list[Object]) -> None:
    gateway(objects)["terminationGracePeriodSeconds"] = 60


@finds("does not wait until Services know")
def a_gateway_ends_at_once(objects: list[Object]) -> None:
    gateway(objects)["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] = ["true"]


@finds("memory without a sizeLimit")
def shared_memory_has_no_limit(objects: list[Object]) -> None:
    del next(volume for volume in pod(objects)["volumes"] if volume["name"] == "shared-mem")["emptyDir"]["sizeLimit"]


@finds("smaller than Ray's object store")
def the_object_store_is_larger_than_shared_memory(objects: list[Object]) -> None:
    group(objects)["rayStartParams"]["object-store-memory"] = str(1 << 30)


@finds("object-store-memory is not set")
def the_object_store_is_left_to_ray(objects: list[Object]) -> None:
    del ray(objects)["headGroupSpec"]["rayStartParams"]["object-store-memory"]


@finds("holds the pods to one node")
def a_claim_is_of_one_node(objects: list[Object]) -> None:
    only(objects, "PersistentVolumeClaim", "models")["spec"]["accessModes"] = ["ReadWriteOnce"]


@finds("would be deleted with the release")
def a_claim_goes_with_the_release(objects: list[Object]) -> None:
    del only(objects, "PersistentVolumeClaim", "pages")["metadata"]["annotations"]


@finds("container autoscaler: readOnlyRootFilesystem")
def the_autoscaler_may_write_anywhere(objects: list[Object]) -> None:
    ray(objects)["autoscalerOptions"]["securityContext"]["readOnlyRootFilesystem"] = False


@finds("num-gpus is 0", case="mig")
def slices_are_not_counted(objects: list[Object]) -> None:
    group(objects)["rayStartParams"]["num-gpus"] = "0"


@finds("num-gpus is None", case="dra")
def claims_are_left_to_the_operator(objects: list[Object]) -> None:
    del group(objects)["rayStartParams"]["num-gpus"]


@finds("would not start at all")
def workers_must_be_near_each_other(objects: list[Object]) -> None:
    terms = pod(objects)["affinity"]["podAffinity"].pop("preferredDuringSchedulingIgnoredDuringExecution")
    pod(objects)["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] = terms


@finds("may all be on one node")
def gateways_are_not_spread(objects: list[Object]) -> None:
    del gateway(objects)["topologySpreadConstraints"]


# --- head and supervisor ---


@finds("would not be started again")
def the_supervisor_is_a_plain_container(objects: list[Object]) -> None:
    del supervisor(objects)["restartPolicy"]


@finds("do not share /tmp/ray")
def the_supervisor_does_not_see_the_session(objects: list[Object]) -> None:
    supervisor(objects)["volumeMounts"] = [m for m in supervisor(objects)["volumeMounts"] if m["name"] != "ray-logs"]


@finds("has no token of Ray")
def the_supervisor_has_no_token(objects: list[Object]) -> None:
    supervisor(objects)["env"] = [entry for entry in supervisor(objects)["env"] if entry["name"] != "RAY_AUTH_TOKEN"]


@finds("would wait for the supervisor")
def the_head_waits_for_the_supervisor(objects: list[Object]) -> None:
    supervisor(objects)["readinessProbe"] = {"grpc": {"port": 50055}}


@finds("actors may run on the head")
def workers_run_on_the_head(objects: list[Object]) -> None:
    ray(objects)["headGroupSpec"]["rayStartParams"]["num-cpus"] = "4"


# --- names and selectors ---


@finds("Service prod-isthmus: its selector finds no pod")
def a_service_finds_nobody(objects: list[Object]) -> None:
    only(objects, "Service", "prod-isthmus")["spec"]["selector"]["app.kubernetes.io/component"] = "gateways"


@finds("Service prod-isthmus: leads to port")
def a_service_names_no_port_of_its_pods(objects: list[Object]) -> None:
    only(objects, "Service", "prod-isthmus")["spec"]["ports"][0]["targetPort"] = "https"


@finds("HTTPRoute prod-isthmus: leads to the port grpc, which does not speak http")
def a_route_of_http_leads_to_grpc(objects: list[Object]) -> None:
    only(objects, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]["port"] = 50051


@finds("HTTPRoute prod-isthmus: leads to prod-isthmus:8000, which is no Service here")
def a_route_names_the_port_of_the_pods(objects: list[Object]) -> None:
    only(objects, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]["port"] = 8000


@finds("Service prod-isthmus: leads to port http, where nothing listens", case="no-autoscaling")
def a_service_has_http_and_gateways_have_none(objects: list[Object]) -> None:
    only(objects, "Service", "prod-isthmus")["spec"]["ports"].append(
        {"name": "http", "port": 8000, "targetPort": "http"}
    )


@finds("which is for people who operate it")
def a_service_shows_the_dashboard(objects: list[Object]) -> None:
    only(objects, "Service", "supervisor")["spec"]["ports"].append({"name": "dashboard", "port": 8265})


@finds("PodDisruptionBudget prod-isthmus-decode: its selector finds no pod")
def a_budget_finds_nobody(objects: list[Object]) -> None:
    budget(objects, "decode")["selector"]["matchLabels"]["app.kubernetes.io/component"] = "decoder"


@finds("has no port ray-metrics")
def a_monitor_asks_a_port_that_is_not_there(objects: list[Object]) -> None:
    only(objects, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] = "ray-metrics"


@finds("nobody exports the metric isthmus_requests_total")
def a_rule_asks_for_a_metric_that_nobody_has(objects: list[Object]) -> None:
    only(objects, "PrometheusRule")["spec"]["groups"][0]["rules"][0]["expr"] = "rate(isthmus_requests_total[1m]) > 1"


@finds("longer than 15 characters")
def a_port_name_is_too_long(objects: list[Object]) -> None:
    worker(objects)["ports"][0]["name"] = "kv-pages-of-the-worker"


@finds("Secret prod-isthmus-tls-prefil is not there")
def a_secret_is_not_there(objects: list[Object]) -> None:
    volume = next(volume for volume in pod(objects)["volumes"] if volume["name"] == "tls")
    volume["secret"]["secretName"] = "prod-isthmus-tls-prefil"


@finds("has no key token", case="default")
def a_secret_has_no_such_key(objects: list[Object]) -> None:
    reference = variable(only(objects, "Pod")["spec"]["containers"][0], "ISTHMUS_API_KEY")["valueFrom"]["secretKeyRef"]
    reference["key"] = "token"


@finds("which is no volume")
def a_mount_has_no_volume(objects: list[Object]) -> None:
    pod(objects)["volumes"] = [volume for volume in pod(objects)["volumes"] if volume["name"] != "models"]


@finds("service account isthmus is not there")
def a_service_account_is_not_there(objects: list[Object]) -> None:
    gateway(objects)["serviceAccountName"] = "isthmus"


# --- containers ---


@finds("names no version")
def an_image_is_latest(objects: list[Object]) -> None:
    worker(objects)["image"] = "registry.example.com:5000/isthmus:latest"


@finds("more than its limit")
def more_memory_is_requested_than_allowed(objects: list[Object]) -> None:
    worker(objects)["resources"]["requests"]["memory"] = "65Gi"


@finds("request and limit of nvidia.com/gpu differ")
def a_gpu_is_only_a_limit(objects: list[Object]) -> None:
    del worker(objects)["resources"]["requests"]["nvidia.com/gpu"]


@finds("runAsNonRoot is not true")
def a_container_may_be_root(objects: list[Object]) -> None:
    del gateway(objects)["containers"][0]["securityContext"]["runAsNonRoot"]


@finds("capabilities are not all dropped")
def a_container_has_capabilities(objects: list[Object]) -> None:
    worker(objects)["securityContext"]["capabilities"] = {"add": ["IPC_LOCK"], "drop": ["ALL"]}


@finds("enableServiceLinks is not false")
def services_become_variables(objects: list[Object]) -> None:
    del gateway(objects)["enableServiceLinks"]


@finds("is a secret, and is spelled out")
def a_password_is_in_the_manifest(objects: list[Object]) -> None:
    found = variable(gateway(objects)["containers"][0], "ISTHMUS_JOBS_DB")
    del found["valueFrom"]
    found["value"] = "postgresql+psycopg://isthmus:secret@db/jobs"


@finds("has replicas beside an autoscaler")
def an_upgrade_undoes_the_autoscaler(objects: list[Object]) -> None:
    only(objects, "Deployment")["spec"]["replicas"] = 3


@finds("each new chart would roll them")
def pods_carry_the_version_of_the_chart(objects: list[Object]) -> None:
    only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]["helm.sh/chart"] = "isthmus-0.1.0"


# --- policies ---


@finds("lets everybody in")
def everybody_reaches_prefill_workers(objects: list[Object]) -> None:
    del policy(objects, "prefill")["ingress"][0]["from"]


@finds("Service prod-isthmus: leads to port http, which no policy opens")
def a_policy_forgets_http(objects: list[Object]) -> None:
    policy(objects, "gateway")["ingress"][0]["ports"].pop()


@finds("lets everybody in at other ports than those of clients", case="default")
def everybody_reaches_the_port_for_health(objects: list[Object]) -> None:
    policy(objects, "gateway")["ingress"][0]["ports"].append({"port": 50054})


@finds("a rule opens every port")
def a_policy_opens_every_port(objects: list[Object]) -> None:
    del policy(objects, "decode")["ingress"][0]["ports"]


@finds("a peer is every pod of the namespace")
def every_pod_reaches_the_supervisor(objects: list[Object]) -> None:
    policy(objects, "supervisor")["ingress"][0]["from"].append({"podSelector": {}})


@finds("a peer is everybody")
def every_namespace_reaches_the_supervisor(objects: list[Object]) -> None:
    policy(objects, "supervisor")["ingress"][0]["from"].append({"namespaceSelector": {}})


@finds("a peer is no pod")
def a_policy_lets_in_who_is_not_there(objects: list[Object]) -> None:
    peer = policy(objects, "decode")["ingress"][0]["from"][0]
    peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] = "gw"


@finds("no policy holds for it")
def no_policy_holds_for_gateways(objects: list[Object]) -> None:
    objects.remove(only(objects, "NetworkPolicy", "gateway"))


@finds("no policy lets it reach the gateways")
def the_test_is_kept_out(objects: list[Object]) -> None:
    policy(objects, "gateway")["ingress"][0]["from"].pop()
