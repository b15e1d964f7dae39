package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	yamlutil "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	crclient "sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/podidentity/podidentity/e2e/cluster"
)

// The administrator's clients of the API server. Tests call the API server hundreds of times. They use these clients
// instead of kubectl, because a kubectl process takes a quarter of a second of CPU time.
var (
	kube      crclient.Client
	clientset *kubernetes.Clientset // for what crclient.Client cannot do, such as reading logs
)

// apiServerConfig returns the configuration of clients that act as user. If user is "", they act as the administrator.
func apiServerConfig(user string) (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", testCluster.Kubeconfig())
	if err != nil {
		return nil, err
	}
	config.Dial, config.QPS = testCluster.DialContext, -1
	config.WarningHandler = rest.NoWarnings{}
	config.Impersonate.UserName = user
	return config, nil
}

func connectToAPIServer() error {
	config, err := apiServerConfig("")
	if err != nil {
		return err
	}
	if kube, err = crclient.New(config, crclient.Options{}); err != nil {
		return err
	}
	clientset, err = kubernetes.NewForConfig(config)
	return err
}

func clientsetAs(t *testing.T, user string) *kubernetes.Clientset {
	t.Helper()
	config, err := apiServerConfig(user)
	must(t, err)
	c, err := kubernetes.NewForConfig(config)
	must(t, err)
	return c
}

// applyYAML creates or updates the objects of a YAML text.
func applyYAML(ctx context.Context, text string) error {
	for documents := yamlutil.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096); ; {
		object := &unstructured.Unstructured{}
		if err := documents.Decode(&object.Object); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("reading a manifest: %w", err)
		}
		if len(object.Object) == 0 {
			continue
		}
		err := kube.Apply(ctx, crclient.ApplyConfigurationFromUnstructured(object), crclient.FieldOwner("e2e"), crclient.ForceOwnership)
		if err != nil {
			return fmt.Errorf("applying %s %s/%s: %w", object.GetKind(), object.GetNamespace(), object.GetName(), err)
		}
	}
}

func (s *testNamespace) apply(yaml string) {
	s.t.Helper()
	must(s.t, applyYAML(s.t.Context(), yaml))
}

// label sets the label by which bindings select the pod.
func (s *testNamespace) label(pod, value string) {
	s.t.Helper()
	patch := crclient.RawPatch(types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"labels":{"aadpodidbinding":%q}}}`, value))
	must(s.t, kube.Patch(s.t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: s.name, Name: pod}}, patch))
}

func getPod(t *testing.T, namespace, name string) *corev1.Pod {
	t.Helper()
	var pod corev1.Pod
	must(t, kube.Get(t.Context(), crclient.ObjectKey{Namespace: namespace, Name: name}, &pod))
	return &pod
}

// waitForPods waits until all pods of the namespace are ready.
func (s *testNamespace) waitForPods() {
	s.t.Helper()
	eventually(s.t, 3*time.Minute, func() error { return podsReady(s.t.Context(), s.name) })
}

// podsReady returns nil if the namespace has pods and all are ready.
func podsReady(ctx context.Context, namespace string) error {
	var pods corev1.PodList
	if err := kube.List(ctx, &pods, crclient.InNamespace(namespace)); err != nil {
		return err
	}
	if len(pods.Items) == 0 {
		return fmt.Errorf("namespace %s has no pods", namespace)
	}
	for _, pod := range pods.Items {
		if !slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		}) {
			return fmt.Errorf("pod %s is not ready: %+v", pod.Name, pod.Status)
		}
	}
	return nil
}

// podOutput returns the log of a pod's container. options.Container may be empty if the pod has only one container.
func podOutput(ctx context.Context, namespace, pod string, options corev1.PodLogOptions) (string, error) {
	text, err := clientset.CoreV1().Pods(namespace).GetLogs(pod, &options).DoRaw(ctx)
	if err != nil {
		return "", fmt.Errorf("reading the log of pod %s/%s: %w", namespace, pod, err)
	}
	return string(text), nil
}

// nmiPod returns the name of the NMI pod on the node.
func nmiPod(t *testing.T, node string) string {
	t.Helper()
	return nmiPodOn(t, node).Name
}

func nmiPodOn(t *testing.T, node string) *corev1.Pod {
	t.Helper()
	var pods corev1.PodList
	must(t, kube.List(t.Context(), &pods, crclient.InNamespace(cluster.ChartNamespace),
		crclient.MatchingLabels{"app.kubernetes.io/component": "nmi"}, crclient.MatchingFields{"spec.nodeName": node}))
	if len(pods.Items) != 1 {
		t.Fatalf("%d NMI pods are on %s; want one", len(pods.Items), node)
	}
	return &pods.Items[0]
}

// nmiLog returns what NMI on the node has logged in the last three minutes.
func nmiLog(t *testing.T, node string) string {
	t.Helper()
	seconds := int64(180)
	text, err := podOutput(t.Context(), cluster.ChartNamespace, nmiPod(t, node), corev1.PodLogOptions{SinceSeconds: &seconds})
	must(t, err)
	return text
}

// lines returns the lines about pods of the namespace that NMI on the node has logged in the last three minutes.
func (s *testNamespace) lines(node string) []logLine {
	s.t.Helper()
	var lines []logLine
	for text := range strings.Lines(nmiLog(s.t, node)) {
		if !strings.Contains(text, `"pod_namespace":"`+s.name+`"`) {
			continue
		}
		line := logLine{raw: text}
		must(s.t, json.Unmarshal([]byte(text), &line))
		lines = append(lines, line)
	}
	return lines
}

// logLine is a line of NMI's log about a token request.
type logLine struct {
	Logger         string
	PodNamespace   string `json:"pod_namespace"`
	Pod            string
	PodUID         string `json:"pod_uid"`
	ServiceAccount string `json:"service_account"`
	Identity       string
	Resource       string
	Status         int
	Reason         string
	Detail         string
	Cache          string
	Verified       string
	CorrelationID  string  `json:"correlation_id"`
	TokenID        string  `json:"token_id"`
	DurationMS     float64 `json:"duration_ms"`
	raw            string
}

// refusalEvents returns the Events about refused token requests, by the name of the pod.
func (s *testNamespace) refusalEvents() map[string][]corev1.Event {
	s.t.Helper()
	var events corev1.EventList
	must(s.t, kube.List(s.t.Context(), &events, crclient.InNamespace(s.name), crclient.MatchingFields{"reason": "TokenRefused"}))
	byPod := map[string][]corev1.Event{}
	for _, e := range events.Items {
		if e.Type != corev1.EventTypeWarning || e.InvolvedObject.Kind != "Pod" {
			s.t.Errorf("unexpected event: %+v", e)
		}
		byPod[e.InvolvedObject.Name] = append(byPod[e.InvolvedObject.Name], e)
	}
	return byPod
}
