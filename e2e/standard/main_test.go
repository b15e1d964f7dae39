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
	// Tests that run side by side spend their time waiting for Azure, not for a processor.
	if err := flag.Set("test.parallel", "64"); err != nil {
		fmt.Fprintln(os.Stderr, "standard:", err)
		os.Exit(1)
	}
	ctrllog.SetLogger(logr.Discard()) // nothing of the client's is worth it
	os.Exit(m.Run())
}

// trial is a test for each of the layouts.
type trial struct {
	name string
	run  func(*testing.T, *layout)
}

// sideBySide have namespaces and identities of their own. The first one begins while no MIC runs, before the others do.
var sideBySide = []trial{
	{"what the predecessor left is taken over without a pod losing its token", thePredecessorsObjects},
	{"a first request waits for the identity, which goes after the last pod", fromFirstToLastPod},
	{"an identity that another pod uses stays", sharedIdentity},
	{"a resource ID that is edited is another identity", editedResourceID},
	{"a client ID that is edited is in force at once", editedClientID},
	{"a binding that is deleted is out of force at once", deletedBinding},
	{"a label that is changed brings another identity", changedLabel},
	{"a pod that is made again on another node keeps its identity", movedPod},
	{"a Job that is done needs nothing", completedJob},
	{"an identity that Azure refuses harms no other, and comes when that is mended", refusedIdentities},
	{"an identity that somebody detached is attached again", detachedByHand},
	{"an identity that somebody else attached is never detached", attachedByHand},
	{"an identity that is to stay is never detached", immutableIdentity},
	{"identities that need no machine are assigned without ARM", withoutMachine},
	{"a namespace is not kept from going", deletedNamespace},
}

// oneByOne change what all others rely on.
var oneByOne = []trial{
	{"an update outlives two leaders and is made once", anUpdateOutlivesItsLeaders},
	{"MIC counts what it does", metricsOfMIC},
	{"ARM was asked as it wants to be", howARMWasAsked},
	{"MIC and NMI take away what they made", uninstall},
}

func TestInOneScaleSet(t *testing.T) { start(t, nil).run(t, sideBySide, oneByOne) }

func TestAsTwoVirtualMachines(t *testing.T) {
	start(t, twoVMs).run(t, append(sideBySide, trial{"a machine about which ARM is silent holds up no other", silentMachine}), oneByOne)
}

func (l *layout) run(t *testing.T, together, apart []trial) {
	t.Run("side by side", func(t *testing.T) {
		for i, one := range together {
			t.Run(one.name, func(t *testing.T) {
				if i > 0 {
					t.Parallel()
				}
				one.run(t, l)
			})
		}
	})
	for _, one := range apart {
		t.Run(one.name, func(t *testing.T) { one.run(t, l) })
	}
}
