package standard

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/go-logr/logr"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// All parallel tests run at the same time, even on a few CPUs, because they mostly wait for the fake Azure.
	if err := flag.Set("test.parallel", "64"); err != nil {
		fmt.Fprintln(os.Stderr, "standard:", err)
		os.Exit(1)
	}
	ctrllog.SetLogger(logr.Discard()) // the client's log does not help to understand a failure
	os.Exit(m.Run())
}

// testCase is a test that runs on each layout of the nodes.
type testCase struct {
	name string
	run  func(*testing.T, *testEnvironment)
}

// Each of parallelTests uses its own namespace and identities. The first two (see firstTests) run alone until they call
// t.Parallel. Until then no other test may run: takeOverFromAADPodIdentity begins in a cluster without MIC, and
// fromFirstToLastPod needs a request that begins before Azure has attached the identity.
var parallelTests = []testCase{
	{"the assignments of AAD Pod Identity are taken over and no pod loses its token", takeOverFromAADPodIdentity},
	{"the first request waits for the identity, which is detached after the last pod", fromFirstToLastPod},
	{"an identity that another pod uses stays attached", sharedIdentity},
	{"an edited resource ID is another identity", editedResourceID},
	{"an edited client ID takes effect immediately", editedClientID},
	{"a deleted binding takes effect immediately", deletedBinding},
	{"a changed label selects another identity", changedLabel},
	{"a pod that is recreated on another node keeps its identity", recreatedPod},
	{"a completed Job uses no identity", completedJob},
	{"an identity that Azure refuses affects no other, and is assigned after a repair", refusedIdentities},
	{"a manually detached identity is attached again", manuallyDetached},
	{"a manually attached identity is never detached", manuallyAttached},
	{"an immutable identity is never detached", immutableIdentity},
	{"identities that are not attached to a machine are assigned without ARM", identitiesWithoutMachine},
	{"a namespace can be deleted", deletedNamespace},
}

const firstTests = 2

// sequentialTests run one after the other, after all parallel tests. They change what other tests depend on, or check
// the effects of all tests before them.
var sequentialTests = []testCase{
	{"an update survives two changes of the leader and is sent once", leaderChangesDuringUpdate},
	{"MIC has metrics", metricsOfMIC},
	{"the requests to ARM follow its rules", requestsToARM},
	{"MIC and NMI remove what they created", uninstall},
}

func TestWithNodesInOneScaleSet(t *testing.T) { start(t, nil).run(t, parallelTests, sequentialTests) }

func TestWithNodesInTwoVirtualMachines(t *testing.T) {
	start(t, twoVMs).run(t, append(parallelTests, testCase{"a machine for which ARM does not answer delays no other", unresponsiveMachine}), sequentialTests)
}

func (l *testEnvironment) run(t *testing.T, parallel, sequential []testCase) {
	t.Run("parallel", func(t *testing.T) {
		for i, one := range parallel {
			t.Run(one.name, func(t *testing.T) {
				if i >= firstTests {
					t.Parallel()
				}
				one.run(t, l)
			})
		}
	})
	for _, one := range sequential {
		t.Run(one.name, func(t *testing.T) { one.run(t, l) })
	}
}
