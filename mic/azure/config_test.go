package azure

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// azureJSON is what AKS writes on the nodes of a cluster with managed identities.
const azureJSON = `{
    "cloud": "AzurePublicCloud",
    "tenantId": "tenant",
    "subscriptionId": "sub",
    "aadClientId": "msi",
    "aadClientSecret": "msi",
    "resourceGroup": "MC_group",
    "location": "westeurope",
    "vmType": "vmss",
    "subnetName": "aks-subnet",
    "cloudProviderBackoff": true,
    "cloudProviderBackoffRetries": 6,
    "useManagedIdentityExtension": true,
    "userAssignedIdentityID": "kubelet",
    "useInstanceMetadata": true,
    "loadBalancerSku": "Standard"
}`

const principalJSON = `{"tenantId":"tenant","aadClientId":"app","aadClientSecret":"` + clientSecret + `"}`

func write(t *testing.T, path, content string) string {
	t.Helper()
	if path == "" {
		path = filepath.Join(t.TempDir(), "azure.json")
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func env(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

func TestTheConfigurationIsReadFromFileAndEnvironment(t *testing.T) {
	aks := Config{Cloud: "AzurePublicCloud", TenantID: "tenant", SubscriptionID: "sub", ResourceGroup: "MC_group", VMType: "vmss", UseManagedIdentity: true, UserAssignedIdentityID: "kubelet"}
	with := func(c Config, change func(*Config)) Config { change(&c); return c }
	cases := []struct {
		name, file string
		env        []string
		want       Config
	}{
		{"managed identity", azureJSON, nil, aks},
		{"service principal", principalJSON, nil, Config{TenantID: "tenant", ClientID: "app", ClientSecret: clientSecret}},
		{"YAML, as for AAD Pod Identity", "cloud: AzureChinaCloud\ntenantId: tenant\naadClientId: app\naadClientSecret: 1234567890\n", nil,
			Config{Cloud: "AzureChinaCloud", TenantID: "tenant", ClientID: "app", ClientSecret: "1234567890"}},
		{"a byte order mark", "\xef\xbb\xbf" + principalJSON, nil, Config{TenantID: "tenant", ClientID: "app", ClientSecret: clientSecret}},
		{"the environment alone", "", []string{
			"CLOUD", "AzureUSGovernmentCloud", "TENANT_ID", "t\n", "CLIENT_ID", "c", "CLIENT_SECRET", clientSecret + "\n", "SUBSCRIPTION_ID", "s", "RESOURCE_GROUP", "g", "VM_TYPE", "standard", "USE_MSI", "false"},
			Config{Cloud: "AzureUSGovernmentCloud", TenantID: "t", ClientID: "c", ClientSecret: clientSecret, SubscriptionID: "s", ResourceGroup: "g", VMType: "standard"}},
		{"managed identity, of the environment", "", []string{"USE_MSI", "True", "USER_ASSIGNED_MSI_CLIENT_ID", "mic", "CLIENT_ID", "msi", "CLIENT_SECRET", "msi"},
			Config{UseManagedIdentity: true, UserAssignedIdentityID: "mic"}},
		{"the environment goes before the file", azureJSON, []string{"USER_ASSIGNED_MSI_CLIENT_ID", "mic", "CLOUD", "AzureChinaCloud"},
			with(aks, func(c *Config) { c.UserAssignedIdentityID, c.Cloud = "mic", "AzureChinaCloud" })},
		{"a secret in the environment goes before the file's managed identity", azureJSON, []string{"CLIENT_ID", "app", "CLIENT_SECRET", clientSecret},
			with(aks, func(c *Config) { c.ClientID, c.ClientSecret, c.UseManagedIdentity = "app", clientSecret, false })},
		{"workload identity, of the webhook", "", []string{"AZURE_CLIENT_ID", "wi", "AZURE_TENANT_ID", "wt", "AZURE_FEDERATED_TOKEN_FILE", "/token", "AZURE_AUTHORITY_HOST", "https://login.microsoftonline.com/"},
			Config{TenantID: "wt", ClientID: "wi", UseWorkloadIdentity: true, FederatedTokenFile: "/token", AuthorityHost: "https://login.microsoftonline.com/"}},
		{"workload identity, of the webhook, beside the file of the node", azureJSON, []string{"AZURE_CLIENT_ID", "wi", "AZURE_TENANT_ID", "wt", "AZURE_FEDERATED_TOKEN_FILE", "/token"},
			with(aks, func(c *Config) {
				c.TenantID, c.ClientID, c.UseWorkloadIdentity, c.FederatedTokenFile = "wt", "wi", true, "/token"
			})},
		{"workload identity, of the file", `{"tenantId":"t","aadClientId":"c","useFederatedWorkloadIdentityExtension":true,"aadFederatedTokenFile":"/file"}`, nil,
			Config{TenantID: "t", ClientID: "c", UseWorkloadIdentity: true, FederatedTokenFile: "/file"}},
		{"the webhook's names mean nothing without its file", principalJSON, []string{"AZURE_CLIENT_ID", "other", "AZURE_TENANT_ID", "other"},
			Config{TenantID: "tenant", ClientID: "app", ClientSecret: clientSecret}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := ""
			c.want.from = "the environment"
			if c.file != "" {
				path = write(t, "", c.file)
				c.want.from = path
			}
			got, err := LoadConfig(path, env(c.env...))
			if err != nil || got != c.want {
				t.Errorf("%v\n%s", err, cmp.Diff(c.want, got, cmp.AllowUnexported(Config{})))
			}
			if _, err := New(got, Options{}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAConfigurationThatCannotBeReadSaysWhichFileAndWhatToDo(t *testing.T) {
	dir := t.TempDir()
	cases := []struct {
		name, content string
		env           []string
		contains      []string
	}{
		{"not there", "-", nil, []string{"no such file", "set --cloudconfig to a file that MIC can read"}},
		{"empty", " \n", nil, []string{"is empty; correct it"}},
		{"broken JSON", "{\n\"cloud\": \"x\",\n\"aadClientSecret\": \"" + clientSecret + "\" oops\n}", nil, []string{"has a JSON syntax error in line 3; correct it"}},
		{"half written", `{"aadClientSecret":"` + clientSecret, nil, []string{"has a JSON syntax error in line 1; correct it"}},
		{"broken YAML", "aadClientSecret: *" + clientSecret + "\n", nil, []string{"cannot be parsed as JSON or YAML; correct it"}},
		{"text", clientSecret, nil, []string{"is not a JSON object; correct it"}},
		{"a list", `["` + clientSecret + `"]`, nil, []string{"is not a JSON object; correct it"}},
		{"a secret that is a list", `{"aadClientSecret":["` + clientSecret + `"]}`, nil, []string{`has a value of the wrong type in the field "aadClientSecret", which must be a string; correct it`}},
		{"a switch that is a text", `{"useManagedIdentityExtension":"` + clientSecret + `"}`, nil, []string{`has a value of the wrong type in the field "useManagedIdentityExtension", which must be a bool; correct it`}},
		{"larger than any", `{"aadClientSecret":"` + strings.Repeat("x", maxConfig) + `"}`, nil, []string{"is larger than 1 MiB"}},
		{"a switch of the environment", "{}", []string{"USE_MSI", clientSecret}, []string{"USE_MSI is neither true nor false; set it to one of them"}},
		{"a custom cloud without a file", `{"cloud":"AZURESTACKCLOUD"}`, nil, []string{"set it to the path of the file that describes the cloud", environmentFile}},
		{"a custom cloud whose file is not there", `{"cloud":"AzureStackCloud"}`, []string{environmentFile, dir + "/none"}, []string{dir + "/none", "no such file", "set " + environmentFile}},
		{"a custom cloud whose file is broken", `{"cloud":"AzureStackCloud"}`, []string{environmentFile, write(t, dir+"/broken", "{")}, []string{dir + "/broken", "has a JSON syntax error in line 1; correct it"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "azure.json")
			if c.content != "-" {
				write(t, path, c.content)
			}
			_, err := LoadConfig(path, env(c.env...))
			if err == nil {
				t.Fatal("LoadConfig returned no error")
			}
			contains := c.contains
			if len(c.env) == 0 && !strings.Contains(c.content, "STACK") {
				contains = append(contains, path)
			}
			for _, want := range contains {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got %q, want %q in it", err, want)
				}
			}
			if strings.Contains(err.Error(), clientSecret) || strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("the message is %q, want one line without the secret", err)
			}
		})
	}
	if _, err := LoadConfig(dir, env()); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("LoadConfig of a folder returned %v, want an error that names the folder", err)
	}
	if _, err := LoadConfig(dir+"/none", env()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("LoadConfig of a missing file returned %v, want fs.ErrNotExist", err)
	}
}

func TestCloudNamesAreCaseInsensitive(t *testing.T) {
	own := Environment{ResourceManagerEndpoint: "https://arm.stack/", TokenAudience: "https://audience"}
	cases := []struct {
		cfg  Config
		want string // part of the address of ARM, or of the error
	}{
		{Config{}, "https://management.azure.com"},
		{Config{Cloud: "AZURECLOUD"}, "https://management.azure.com"},
		{Config{Cloud: "azurePublicCloud"}, "https://management.azure.com"},
		{Config{Cloud: "AzureUSGovernmentCloud"}, "https://management.usgovcloudapi.net"},
		{Config{Cloud: "AZUREUSGOVERNMENT"}, "https://management.usgovcloudapi.net"},
		{Config{Cloud: "AzureChinaCloud"}, "https://management.chinacloudapi.cn"},
		{Config{Cloud: "azurestackcloud", Environment: own}, "https://arm.stack/"},
		{Config{Cloud: "AzureGermanCloud"}, `cloud "AzureGermanCloud" in the configuration is unknown`},
		{Config{Cloud: "AzureStackCloud"}, "requires resourceManagerEndpoint"},
		{Config{Cloud: "AzureStackCloud", Environment: Environment{ResourceManagerEndpoint: "http://arm.stack/", TokenAudience: "a"}}, "an https URL"},
		{Config{Cloud: "AzureStackCloud", Environment: Environment{ResourceManagerEndpoint: "https://arm.stack/"}}, "tokenAudience"},
		{Config{Cloud: "AzureStackCloud", Environment: Environment{ResourceManagerEndpoint: "https://arm.stack/", TokenAudience: "a", ActiveDirectoryEndpoint: "login.stack"}}, `activeDirectoryEndpoint "login.stack"`},
		{Config{AuthorityHost: "login.microsoftonline.com"}, "AZURE_AUTHORITY_HOST"},
	}
	for _, c := range cases {
		where, err := c.cfg.cloud()
		got := fmt.Sprint(err)
		if err == nil {
			got = where.Services["resourceManager"].Endpoint
		}
		if !strings.Contains(got, c.want) {
			t.Errorf("%+v: got %s, want %s", c.cfg, got, c.want)
		}
	}
}

func TestTheEnvironmentFileOfACustomCloudIsRead(t *testing.T) {
	file := write(t, "", `{"name":"AzureStackCloud","managementPortalURL":"https://portal.stack/","serviceManagementEndpoint":"https://management.stack/guid",
		"resourceManagerEndpoint":"https://arm.stack/","activeDirectoryEndpoint":"https://login.stack/","tokenAudience":"","resourceIdentifiers":{"graph":"N/A"}}`)
	cfg, err := LoadConfig("", env("CLOUD", "AzureStackCloud", environmentFile, file))
	if err != nil {
		t.Fatal(err)
	}
	where, err := cfg.cloud()
	if err != nil || where.ActiveDirectoryAuthorityHost != "https://login.stack/" || where.Services["resourceManager"].Audience != "https://management.stack/guid" {
		t.Errorf("got %+v, %v; want the endpoints of the environment file", where, err)
	}
}

func TestASecretIsNotFormatted(t *testing.T) {
	cfg := Config{TenantID: "tenant", ClientSecret: clientSecret}
	encoded, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, reported := range []string{fmt.Sprint(cfg), fmt.Sprintf("%+v", cfg), fmt.Sprintf("%#v", cfg), fmt.Sprintf("%s, %q", cfg.TenantID, cfg.ClientSecret), string(encoded)} {
		if strings.Contains(reported, clientSecret) || !strings.Contains(reported, "tenant") {
			t.Errorf("the configuration is formatted as %s, want the tenant in it and no secret", reported)
		}
	}
}

func TestOwnIdentitiesReturnsMICsIdentity(t *testing.T) {
	if own := (Config{UserAssignedIdentityID: "kubelet"}).OwnIdentities(); !slices.Equal(own, []string{"kubelet"}) {
		t.Errorf("got %v, want only kubelet", own)
	}
	if own := (Config{ClientID: "app"}).OwnIdentities(); len(own) != 0 {
		t.Errorf("got %v, want none", own)
	}
}
