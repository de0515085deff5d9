-- Leases and heartbeats do not end while a test runs; slots are busy, so that nothing is dispatched.

INSERT INTO workloads (name, title, config_schema, reports) VALUES
  ('bytelm', 'A small language model on bytes.', '{"properties": {"d_model": {"type": "integer", "default": 64}}}', '{}');
INSERT INTO workers (incarnation, name, host, url, secret, workloads, versions, last_seen_at, drain)
SELECT CAST(lpad(n::text, 32, 'a') AS uuid), 'gpu-' || n, 'rack' || n || '.lab', 'http://127.0.0.1:1', '',
       '{bytelm}', '{"torch": "2.13.0", "relight": "0.1.0"}',
       now() + CASE n WHEN 4 THEN interval '-1 hour' ELSE interval '1 day' END, CASE n WHEN 3 THEN 'finish' END
  FROM generate_series(1, 4) n;
INSERT INTO slots (incarnation, index, device, device_uuid, cores, operation_id, attempt)
SELECT CAST(lpad(n::text, 32, 'a') AS uuid), i, 'cuda', 'GPU-8f' || n || i || 'c1d2', 8,
       NULL, NULL
  FROM generate_series(1, 4) n, generate_series(0, 3) i;
INSERT INTO operations (id, name, kind, workload, job, labels, priority, max_retries, submitted_by, status, attempt,
                        event_seq, logged_event_seq, error, created_at, started_at, ended_at)
SELECT CASE WHEN n <= 2 THEN CAST(lpad(to_hex(n), 32, '0') AS uuid) ELSE CAST(md5(CAST(n AS text)) AS uuid) END,
       (ARRAY['pretrain-small', 'resnet-ablation', 'digits-sweep', 'tokenizer-probe', 'ptycho-recon'])[n % 5 + 1] || '-' || n,
       'training', (ARRAY['bytelm', 'digits', 'lab.models:Vit'])[n % 3 + 1],
       CAST(format('{"kind": "training", "workload": "%s", "config": {"d_model": 512, "n_layer": %s, "dropout": 0.1}, "command": null, "code": null, "workdir": ".", "env": {}, "secrets": [], "artifacts": [], "resources": {"cores": null}, "until_step": null, "execution": {"max_epochs": 40, "learning_rate": %s, "batch_size": 64, "optimizer": "adamw", "scheduler": "cosine", "seed": %s, "precision": "bf16", "checkpoint_every": "auto", "logger": "csv"}}', 'bytelm', 2 + n % 6, 0.001 / (1 + n % 7), n % 9) AS jsonb),
       jsonb_build_object('team', (ARRAY['vision', 'language', 'physics'])[n % 3 + 1]), 0, 3, 'operator',
       s.status, CASE WHEN s.status = 'pending' THEN 0 WHEN n = 2 THEN 3 ELSE 1 END, 0, 0,
       CASE s.status WHEN 'failed' THEN
         '{"code": "out_of_memory", "message": "CUDA out of memory: tried to allocate 2.50 GiB; a smaller batch_size needs less", "details": {}}'::jsonb END,
       now() - n * interval '97 s', CASE WHEN s.status <> 'pending' THEN now() - n * interval '97 s' END,
       CASE WHEN s.status IN ('completed', 'failed', 'cancelled') THEN now() - n * interval '61 s' END
  FROM generate_series(1, @operations) n,
       LATERAL (SELECT CASE WHEN n <= 2 OR n < 40 AND n % 4 = 1 THEN 'running' WHEN n < 6 THEN 'pending' WHEN n % 9 = 0 THEN 'failed'
                            WHEN n % 14 = 0 THEN 'cancelled' ELSE 'completed' END AS status) s;
INSERT INTO attempts (operation_id, number, incarnation, start_step, claimed_at, started_at, ended_at, outcome,
                      exactness, environment)
SELECT id, 1, CAST(lpad(CAST(1 + abs(hashtext(name)) % 3 AS text), 32, 'a') AS uuid), 0, created_at, created_at, ended_at,
       CASE WHEN status IN ('completed', 'failed', 'cancelled') THEN status END, '{"promise": "promised", "reasons": []}',
       '{"torch": "2.13.0", "device": "NVIDIA H100 80GB HBM3", "threads": 8, "python": "3.11.7"}'
  FROM operations WHERE attempt > 0;
INSERT INTO holds (operation_id, attempt, incarnation, lease_expires_at, last_seq, progress, first_step, last_step, ended_at)
SELECT a.operation_id, 1, a.incarnation, now() + interval '1 day', @points / 1000,
       jsonb_build_object('step', CASE o.status WHEN 'completed' THEN 40000 ELSE 4000 + abs(hashtext(o.name)) % 30000 END,
                          'steps_total', 40000, 'epoch', 7, 'loss', 0.2 + (abs(hashtext(o.name)) % 1000) / 700.0,
                          'samples_per_s', 5320.5, 'eta_s', 60 + abs(hashtext(o.name)) % 9000), 0, 30000, a.ended_at
  FROM attempts a JOIN operations o ON o.id = a.operation_id;

UPDATE attempts SET outcome = 'failed', claimed_at = now() - interval '170 min', ended_at = now() - interval '101 min',
                    error = '{"code": "trainer_killed", "message": "The trainer was killed by SIGKILL (out of memory?)", "details": {}}'
 WHERE operation_id = '@stormy';
UPDATE holds SET ended_at = now() - interval '101 min', last_step = 11840 WHERE operation_id = '@stormy';
UPDATE operations SET name = 'pretrain-small-stormy', created_at = now() - interval '172 min',
                      started_at = now() - interval '170 min', failures = 1, event_seq = 7, logged_event_seq = 7 WHERE id = '@stormy';
INSERT INTO attempts (operation_id, number, incarnation, start_step, claimed_at, started_at, ended_at, outcome, exactness, environment)
SELECT '@stormy', n, CAST(lpad(n::text, 32, 'a') AS uuid), CASE n WHEN 2 THEN 11500 ELSE 19200 END,
       now() - CASE n WHEN 2 THEN interval '100 min' ELSE interval '48 min' END, now() - CASE n WHEN 2 THEN interval '100 min' ELSE interval '48 min' END,
       CASE n WHEN 2 THEN now() - interval '52 min' END, CASE n WHEN 2 THEN 'lost' END, '{"promise": "promised", "reasons": []}',
       '{"torch": "2.13.0", "device": "NVIDIA H100 80GB HBM3", "threads": 8, "python": "3.11.7"}'
  FROM generate_series(2, 3) n;
INSERT INTO holds (operation_id, attempt, incarnation, lease_expires_at, last_seq, progress, first_step, last_step, ended_at)
SELECT '@stormy', n, CAST(lpad(n::text, 32, 'a') AS uuid), now() + interval '1 day', 300,
       '{"step": 28412, "steps_total": 40000, "epoch": 28, "loss": 0.4173, "samples_per_s": 5320.5, "eta_s": 2281}',
       CASE n WHEN 2 THEN 11500 ELSE 19200 END, CASE n WHEN 2 THEN 19733 ELSE 28411 END, CASE n WHEN 2 THEN now() - interval '52 min' END
  FROM generate_series(2, 3) n;
INSERT INTO events (operation_id, seq, at, name, attempt, from_status, to_status, detail)
SELECT '@stormy', seq, now() - m * interval '1 min', name, attempt, source, target, detail::jsonb FROM (VALUES
  (1, 172, 'submit', 0, NULL, 'pending', '{}'), (2, 170, 'claim', 1, 'pending', 'running', '{}'),
  (3, 101, 'retry', 1, 'running', 'pending', '{"error": {"code": "trainer_killed", "message": "The trainer was killed by SIGKILL (out of memory?)"}, "failures": 1, "max_retries": 3, "retry_in_s": 5}'),
  (4, 100, 'claim', 2, 'pending', 'running', '{}'), (5, 52, 'lost', 2, 'running', 'pending', '{}'),
  (6, 48, 'claim', 3, 'pending', 'running', '{}'),
  (7, 47, 'note', 3, 'running', 'running', '{"message": "checkpoint_every auto: every 338 steps, as a save costs 0.4 s and attempts fail every 3 h"}')) AS e (seq, m, name, attempt, source, target, detail);
INSERT INTO checkpoints (id, operation_id, attempt, checkpoint_type, status, step, epoch, phase, path, size_bytes, manifest_sha256, monitored, created_at)
SELECT CAST(lpad(to_hex(n), 32, 'c') AS uuid), '@stormy', 1 + (n > 11)::int + (n > 19)::int, CASE n WHEN 0 THEN 'initial' ELSE 'periodic' END, 'committed',
       n * 1000, n, 'update', '@stormy/' || n, 268435456, repeat('0', 64), 3.0 / (1 + n * 0.2), now() - (170 - 6 * n) * interval '1 min'
  FROM generate_series(0, 28) n;

INSERT INTO metrics (operation_id, attempt, seq, name, first_step, steps, values)
SELECT '@stormy', a, b, name, lo, array_agg(step ORDER BY step), array_agg(value ORDER BY step)
  FROM (SELECT 1 + (step >= 11500)::int + (step >= 19200)::int AS a, 1 + step / 100 AS b, (step / 100) * 100 AS lo, step, name,
               CASE name WHEN 'loss' THEN 0.35 + 2.4 * exp(-step / 5000.0) + 0.12 * (random() - 0.5) + 0.05 * sin(step / 900.0)
                         WHEN 'learning_rate' THEN 0.001 * (1 + cos(step / 40000.0 * pi())) / 2
                         WHEN 'grad_norm' THEN 0.4 + 3 * exp(-step / 3000.0) + 0.6 * random() * random() * random() * random()
                         WHEN 'val_loss' THEN 0.42 + 2.2 * exp(-step / 5200.0) + 0.02 * (random() - 0.5)
                         ELSE 0.97 - 0.6 * exp(-step / 6000.0) - 0.01 * random() END AS value
          FROM generate_series(CAST(0 AS bigint), 28411, 8) step, unnest(ARRAY['loss', 'learning_rate', 'grad_norm', 'val_loss', 'val_accuracy']) name
         WHERE name NOT LIKE 'val%' OR step % 1000 = 0) p
 GROUP BY a, b, lo, name;
INSERT INTO metrics (operation_id, attempt, seq, name, first_step, steps, values)
SELECT '@large', 1, n + 1, 'loss', n * 1000, (SELECT array_agg(n * 1000 + i) FROM generate_series(0, 999) i),
       (SELECT array_agg(CASE WHEN n BETWEEN 640 AND 645 THEN 'NaN' WHEN n = 800 AND i = 500 THEN 40
                              ELSE 0.3 + 2.5 * exp(-n / (@points / 8000.0)) + 0.2 * (random() - 0.5) END ORDER BY i) FROM generate_series(0, 999) i)
  FROM generate_series(CAST(0 AS bigint), @points / 1000 - 1) n;
UPDATE attempts SET checkpoint_id = CAST(lpad(CASE number WHEN 2 THEN 'b' ELSE '13' END, 32, 'c') AS uuid)
 WHERE operation_id = '@stormy' AND number > 1;
UPDATE slots s SET operation_id = h.operation_id, attempt = h.attempt
  FROM (SELECT *, row_number() OVER (PARTITION BY incarnation ORDER BY operation_id) - 1 AS nth
          FROM holds WHERE ended_at IS NULL) h
 WHERE h.incarnation = s.incarnation AND h.nth = s.index;
-- 300 W of a GPU, a window every hundred steps, and of the last attempt one of which nothing is known.
INSERT INTO energy_windows (operation_id, attempt, incarnation, device, index, source, quality, use, epoch, first_step, until_step,
                            units, duration_us, energy_uj, error_uj, reason, baseline_w, state)
SELECT h.operation_id, h.attempt, h.incarnation, 'GPU-8f' || h.attempt || '0c1d2', row_number() OVER (PARTITION BY h.attempt ORDER BY step),
       'nvml_counter', 'measured', CASE WHEN step = a.start_step THEN 'startup' WHEN step % 1000 = 0 THEN 'evaluate' ELSE 'train' END,
       step / 1000, step, step + 100, 6400, 24000000, CASE WHEN step <> 28300 THEN 7200000000 + step * 10000 END, 3000000,
       CASE WHEN step = 28300 THEN 'device_lost' END, 62, '{"power_max_w": 402.5, "temperature_max_c": 81, "throttled_s": {"sw_power_cap": 0.8}}'
  FROM holds h JOIN attempts a ON a.operation_id = h.operation_id AND a.number = h.attempt,
       generate_series(a.start_step, h.last_step - 1, 100) step
 WHERE h.operation_id = '@stormy';
INSERT INTO energy_sums (operation_id, attempt, incarnation, device, source, quality, use, windows, unknown, without_error, energy_uj,
                         error_uj, duration_us, steps, units, reason)
SELECT operation_id, attempt, incarnation, device, source, quality, use, count(*), count(*) - count(energy_uj), 0, sum(energy_uj),
       sum(error_uj), sum(duration_us), sum(until_step - first_step), sum(units), min(reason)
  FROM energy_windows GROUP BY operation_id, attempt, incarnation, device, source, quality, use;
UPDATE workers SET devices = jsonb_build_array(
         jsonb_build_object('device', 'GPU-8f10c1d2', 'name', 'NVIDIA H100 80GB HBM3', 'power_w', 391.5, 'temperature_c', 78,
                            'utilization_percent', 99, 'memory_used_bytes', 61000000000, 'throttle', '["sw_power_cap"]'::jsonb),
         jsonb_build_object('device', 'GPU-8f11c1d2', 'name', 'NVIDIA H100 80GB HBM3')) WHERE name = 'gpu-1';
ANALYZE;
