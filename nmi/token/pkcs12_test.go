package token

import (
	"context"
	"encoding/asn1"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"software.sslmate.com/src/go-pkcs12"
)

// patientOpener returns an opener with a longer timeout than that of NMI, because a busy computer can need more than
// pkcs12Timeout to open a valid file.
func patientOpener() *pkcs12Opener {
	o := newPKCS12Opener()
	o.timeout = time.Minute
	return o
}

// keepPriority keeps this process at the normal priority: it undoes the lowest priority that limitProcess sets, if the
// kernel permits that. On a busy computer a process of the lowest priority can wait minutes for two seconds of CPU
// time.
func keepPriority() {
	for {
		_ = unix.Setpriority(unix.PRIO_PGRP, 0, 0)
		time.Sleep(20 * time.Millisecond)
	}
}

// TestMain calls ParsePKCS12Main instead of the tests if the argument of the program is ParseCommand. So the test
// program can be its own child process, like NMI.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == ParseCommand {
		if len(os.Environ()) != 0 {
			fmt.Fprintln(os.Stderr, "the child process has environment variables; want none")
			os.Exit(1)
		}
		go keepPriority()
		if err := ParsePKCS12Main(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// encode returns a PKCS#12 file with the key and certificate c, and the certificates others.
func encode(t testing.TB, encoder *pkcs12.Encoder, c testCertificate, password string, others ...testCertificate) []byte {
	t.Helper()
	chain := parsed(t, others...)
	file, err := encoder.Encode(c.key, parsed(t, c)[0], chain, password)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// slow returns a PKCS#12 file with so many hash iterations that it takes far longer than pkcs12CPU to open.
func slow(t testing.TB) []byte {
	t.Helper()
	var file struct {
		Version  int
		AuthSafe asn1.RawValue
		MacData  struct {
			Mac        asn1.RawValue
			Salt       []byte
			Iterations int
		}
	}
	if _, err := asn1.Unmarshal(encode(t, pkcs12.Modern2023, ec256(), "password"), &file); err != nil {
		t.Fatal(err)
	}
	file.MacData.Iterations = 1<<31 - 1
	changed, err := asn1.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

func TestASlowPKCS12FileTimesOut(t *testing.T) {
	t.Parallel()
	start := time.Now()
	o := patientOpener()
	_, err := o.open(t.Context(), slow(t), "password")
	var f flaw
	if !errors.As(err, &f) || !strings.Contains(string(f), "fewer iterations") {
		t.Errorf("a file with too many iterations: got %v after %v, want a flaw", err, time.Since(start))
	}
}

func TestOpeningAPKCS12FileEndsWithTheContext(t *testing.T) {
	t.Parallel()
	o := newPKCS12Opener()
	file := slow(t)
	for range pkcs12Concurrent + 1 { // one after the other; each must free its slot
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := o.open(ctx, file, "password"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("open returned %v, want the error of its context", err)
		}
	}
	if len(o.running) != 0 {
		t.Errorf("%d calls of open have returned without freeing their slot", len(o.running))
	}
}

func TestNoMorePKCS12FilesAreOpenedAtATimeThanAllowed(t *testing.T) {
	o := newPKCS12Opener()
	for range pkcs12Concurrent {
		o.running <- struct{}{}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := o.open(ctx, nil, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("while no slot is free, open returned %v, want the error of its context", err)
	}
}

func TestAParserThatCannotBeStartedIsNotTheSecretsFault(t *testing.T) {
	for _, program := range []string{"/nonexistent", "/bin/false", "/bin/true"} {
		o := newPKCS12Opener()
		o.program = program
		_, err := o.open(t.Context(), encode(t, pkcs12.Modern2023, ec256(), ""), "")
		var f flaw
		if err == nil || errors.As(err, &f) {
			t.Errorf("parser program %s: got %v, want an error that is not a flaw", program, err)
		}
		if failed := contentError(Ref{"ns", "name"}, err); failed.Class != Unavailable {
			t.Errorf("parser program %s: got %+v, want an error of class Unavailable", program, failed)
		}
	}
}

func TestTheOutputOfTheParserIsBounded(t *testing.T) {
	b := &limitedBuffer{limit: 4}
	if _, err := b.Write([]byte("1234")); err != nil {
		t.Error(err)
	}
	if _, err := b.Write([]byte("5")); err == nil || b.Len() != 4 {
		t.Errorf("a Write above the limit returned no error, or the buffer has %d bytes instead of 4", b.Len())
	}
}
