-- The rows of a service of schema 0001, killed with SIGKILL: one training had completed, one ran, with two checkpoints.

INSERT INTO operations VALUES
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'done', 'training', 'digits', '{"kind": "training", "config": {"hidden": 64, "dropout": 0.1, "channels": 16}, "workload": "digits", "execution": {"seed": 0, "threads": 2, "max_steps": null, "optimizer": "adamw", "scheduler": "constant", "batch_size": 32, "max_epochs": 2, "accelerator": "auto", "num_workers": 0, "deterministic": true, "gradient_clip": null, "learning_rate": 0.001, "checkpoint_every": {"steps": null, "epochs": 1}, "accumulate_grad_batches": 1}}', '{}', 0, 3, 'operator', 'a2818301-533e-45c4-813f-09240258c67c', '2e2260dddda13089e41149a716cfdc06ee4715645f686eb44b55b7dae70cd0d7', 'completed', 1, 3, 0, 0, NULL, NULL, false, false, NULL, false, NULL, '2026-11-26 01:07:36.094738+00', '2026-11-26 01:07:36.113207+00', '2026-11-26 01:08:03.849524+00'),
	('b30ecf8a-9fa1-486a-a363-b66dfd8e63ab', 'halfway', 'training', 'digits', '{"kind": "training", "config": {"hidden": 64, "dropout": 0.1, "channels": 16}, "workload": "digits", "execution": {"seed": 0, "threads": 2, "max_steps": null, "optimizer": "adamw", "scheduler": "constant", "batch_size": 32, "max_epochs": 12, "accelerator": "auto", "num_workers": 0, "deterministic": true, "gradient_clip": null, "learning_rate": 0.01, "checkpoint_every": {"steps": null, "epochs": 1}, "accumulate_grad_batches": 1}}', '{}', 0, 3, 'operator', 'ae9725fa-90fc-4488-a692-5e6b70cab030', 'fa916c37fcc2815338866da93b826c0313e9ee1e8caae9092fe8d32bf363beb2', 'running', 1, 2, 0, 0, NULL, NULL, false, false, NULL, false, NULL, '2026-11-26 01:07:37.157279+00', '2026-11-26 01:08:04.366529+00', NULL);

INSERT INTO workers VALUES
	('c7698f7a-2fec-454e-8e0b-35c57304a081', 'worker-1', 'vm', 'http://127.0.0.1:40365', 'a secret of a worker that is gone', '{bytelm,digits}', '{"torch": "2.13.0+cpu", "python": "3.11.7", "relight": "0.1.0.dev0"}', false, '2026-11-26 01:06:42.335401+00', '2026-11-26 01:09:50.369087+00');

INSERT INTO attempts VALUES
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 1, 'c7698f7a-2fec-454e-8e0b-35c57304a081', NULL, 0, '2026-11-26 01:07:36.113207+00', '2026-11-26 01:07:38.877721+00', '2026-11-26 01:08:03.849524+00', 'completed', 'null', 3096, '{"host": "vm", "cores": 2, "numpy": "2.4.6", "torch": "2.13.0+cpu", "device": "AMD EPYC", "python": "3.11.7", "threads": "2", "platform": "Linux-6.18.44-fc-v669-x86_64-with-glibc2.36", "executable": "/work/wt/service/.venv/bin/python", "accelerator": "cpu", "code_digest": "f5760729679fa56aa163555d16ae661461eaf494a2ff2b36ba742b3c80a0c50e", "data_digest": "8b3b6ae90863430bdef06a3f7d1ec2f6a905a53d3375655b18cf63780ad98772", "cpu_capability": "AVX512", "matmul_precision": "highest"}', '{"promise": "promised", "reasons": []}'),
	('b30ecf8a-9fa1-486a-a363-b66dfd8e63ab', 1, 'c7698f7a-2fec-454e-8e0b-35c57304a081', NULL, 0, '2026-11-26 01:08:04.366529+00', '2026-11-26 01:08:13.580478+00', NULL, NULL, NULL, 3469, '{"host": "vm", "cores": 2, "numpy": "2.4.6", "torch": "2.13.0+cpu", "device": "AMD EPYC", "python": "3.11.7", "threads": "2", "platform": "Linux-6.18.44-fc-v669-x86_64-with-glibc2.36", "executable": "/work/wt/service/.venv/bin/python", "accelerator": "cpu", "code_digest": "f5760729679fa56aa163555d16ae661461eaf494a2ff2b36ba742b3c80a0c50e", "data_digest": "8b3b6ae90863430bdef06a3f7d1ec2f6a905a53d3375655b18cf63780ad98772", "cpu_capability": "AVX512", "matmul_precision": "highest"}', '{"promise": "promised", "reasons": []}');

INSERT INTO checkpoints VALUES
	('94719d26-8b5e-4910-918a-458ea4c8adfb', '60575ba1-9e39-4524-8681-262f89c1fa7b', 1, 'initial', 'committed', 0, 0, 'update', '60575ba1-9e39-4524-8681-262f89c1fa7b/1-0', 158342, '4b8b3d34099fff5ce2789926e9876f2f962306593333c83bdee3bbb3d8d89731', NULL, '2026-11-26 01:07:38.900659+00'),
	('abd1531d-dc28-4cb9-bc91-67ebcdc673e4', '60575ba1-9e39-4524-8681-262f89c1fa7b', 1, 'periodic', 'committed', 48, 1, 'update', '60575ba1-9e39-4524-8681-262f89c1fa7b/1-48', 471962, '49c1a3aa832c57fd1564bf060d3d591d9a8169d7d73f5413e766581422c264b2', NULL, '2026-11-26 01:07:52.458235+00'),
	('0a16f716-6d24-4c88-9e4d-a38435344ba8', '60575ba1-9e39-4524-8681-262f89c1fa7b', 1, 'final', 'committed', 96, 2, 'update', '60575ba1-9e39-4524-8681-262f89c1fa7b/1-96', 471962, '3bd7fe3fb24f462cf57b377e0e73f1b94d73dfd7758fab6cfa0d7e3b3261b909', NULL, '2026-11-26 01:08:03.641852+00'),
	('63fb4a37-ea6f-4997-ad99-04a534f6e98a', 'b30ecf8a-9fa1-486a-a363-b66dfd8e63ab', 1, 'initial', 'committed', 0, 0, 'update', 'b30ecf8a-9fa1-486a-a363-b66dfd8e63ab/1-0', 158341, '7299fca815223d7c00aaffc53f24e9643ac918976707d24e21e60af4fdc083c6', NULL, '2026-11-26 01:08:13.648187+00'),
	('8909b671-de65-43a2-90d7-01c6fccb3c05', 'b30ecf8a-9fa1-486a-a363-b66dfd8e63ab', 1, 'periodic', 'committed', 48, 1, 'update', 'b30ecf8a-9fa1-486a-a363-b66dfd8e63ab/1-48', 471961, '2f40f50d6854a73ccec60ade496b9d1d561f1b6bce18f8b094d25f6450dd4b6b', NULL, '2026-11-26 01:08:45.023279+00'),
	('98121b27-d8e9-4076-be6b-4bd3837e86ee', 'b30ecf8a-9fa1-486a-a363-b66dfd8e63ab', 1, 'periodic', 'committed', 96, 2, 'update', 'b30ecf8a-9fa1-486a-a363-b66dfd8e63ab/1-96', 471961, 'bb1454f297fe56bbbe9ee3e06b4557b2891d407f405955f1e92868f4fbf4c7fe', NULL, '2026-11-26 01:09:23.044441+00');

INSERT INTO events VALUES
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 1, '2026-11-26 01:07:36.094738+00', 0, 'submit', NULL, 'pending', '{}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 2, '2026-11-26 01:07:36.113207+00', 1, 'claim', 'pending', 'running', '{"worker": "c7698f7a-2fec-454e-8e0b-35c57304a081"}'),
	('b30ecf8a-9fa1-486a-a363-b66dfd8e63ab', 1, '2026-11-26 01:07:37.157279+00', 0, 'submit', NULL, 'pending', '{}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 3, '2026-11-26 01:08:03.849524+00', 1, 'complete', 'running', 'completed', '{"outcome": "completed"}'),
	('b30ecf8a-9fa1-486a-a363-b66dfd8e63ab', 2, '2026-11-26 01:08:04.366529+00', 1, 'claim', 'pending', 'running', '{"worker": "c7698f7a-2fec-454e-8e0b-35c57304a081"}');

INSERT INTO holds VALUES
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 1, 'c7698f7a-2fec-454e-8e0b-35c57304a081', '2026-11-26 01:08:16.30411+00', 40, '{"loss": 0.18189647793769836, "step": 96, "epoch": 2, "eta_s": 0.0, "steps_total": 96, "samples_per_s": 266.8236707173692}', 0, 95, 96, '2026-11-26 01:08:03.849524+00'),
	('b30ecf8a-9fa1-486a-a363-b66dfd8e63ab', 1, 'c7698f7a-2fec-454e-8e0b-35c57304a081', '2026-11-26 01:10:05.369087+00', 93, '{"loss": 0.016230948269367218, "step": 134, "epoch": 2, "eta_s": 248.16830570993625, "steps_total": 576, "samples_per_s": 56.993579254764995}', 0, 134, 96, NULL);

INSERT INTO metrics VALUES
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 0, '{0}', '{2.2717936038970947}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 1, '{1,2,3,4}', '{2.285522937774658,2.211031198501587,2.0605146884918213,2.0455853939056396}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 5, '{5,6,7,8,9}', '{1.9564571380615234,1.9075968265533447,1.885341763496399,1.6951864957809448,1.761269450187683}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 10, '{10,11,12,13}', '{1.676979899406433,1.661474347114563,1.645175814628601,1.4546915292739868}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 14, '{14,15,16}', '{1.480556845664978,1.30568528175354,1.4710888862609863}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 17, '{17}', '{1.2733285427093506}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 18, '{18,19,20,21}', '{1.2674946784973145,1.0547529458999634,1.2178854942321777,1.0855586528778076}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 22, '{22,23}', '{0.9902650713920593,1.045684814453125}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 24, '{24,25,26,27}', '{1.0837572813034058,0.786996603012085,0.7641786932945251,0.83122718334198}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 28, '{28,29,30,31,32}', '{0.6254843473434448,0.7824063301086426,0.6288090348243713,0.6373636722564697,0.7994177937507629}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 33, '{33}', '{0.7594714760780334}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 34, '{34}', '{0.5193653702735901}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 35, '{35,36,37}', '{0.49585381150245667,0.6623128652572632,0.5646223425865173}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 38, '{38,39}', '{0.4593620300292969,0.4760604202747345}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 40, '{40,41}', '{0.6724677085876465,0.7354679107666016}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 42, '{42,43,44}', '{0.4382631182670593,0.4447198212146759,0.3733571469783783}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 45, '{45,46}', '{0.43999549746513367,0.3638143241405487}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 47, '{47}', '{0.43206271529197693}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'val_loss', 1, 47, '{47}', '{0.5504302992217842}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 48, '{48,49,50,51}', '{0.32646122574806213,0.24908828735351562,0.2916566729545593,0.28093618154525757}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 52, '{52,53}', '{0.17740006744861603,0.38619139790534973}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 54, '{54}', '{0.24019291996955872}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 55, '{55,56,57}', '{0.20525720715522766,0.2983072102069855,0.2916161119937897}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 58, '{58,59,60}', '{0.24554355442523956,0.31610816717147827,0.2501601576805115}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 61, '{61,62,63}', '{0.27821779251098633,0.21492767333984375,0.3001318871974945}');

INSERT INTO metrics VALUES
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 64, '{64,65,66}', '{0.1613456904888153,0.18851563334465027,0.18355950713157654}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 72, '{72,73,74,75}', '{0.17105337977409363,0.19951710104942322,0.23368753492832184,0.24357350170612335}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 76, '{76,77,78}', '{0.24814292788505554,0.11182688176631927,0.152292862534523}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 83, '{83,84,85,86,87,88}', '{0.11815793067216873,0.09731042385101318,0.16076621413230896,0.14248450100421906,0.2330264449119568,0.21934492886066437}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'val_loss', 1, 95, '{95}', '{0.3463358036402998}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 67, '{67,68,69,70,71}', '{0.11727382242679596,0.18197695910930634,0.3810833692550659,0.1286025196313858,0.2267846316099167}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 79, '{79,80}', '{0.16013650596141815,0.13366390764713287}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 81, '{81,82}', '{0.23823866248130798,0.20936569571495056}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 89, '{89,90,91}', '{0.2605835497379303,0.15517553687095642,0.09227991104125977}'),
	('60575ba1-9e39-4524-8681-262f89c1fa7b', 'loss', 1, 92, '{92,93,94,95}', '{0.0612359382212162,0.11052148044109344,0.14777891337871552,0.18189647793769836}');

INSERT INTO service VALUES
	(1, '2026-11-26 01:09:52.445384+00', '2026-11-26 01:06:41.202414+00');

INSERT INTO slots VALUES
	('c7698f7a-2fec-454e-8e0b-35c57304a081', 0, 'cpu', NULL, 2, 'b30ecf8a-9fa1-486a-a363-b66dfd8e63ab', 1, NULL);

INSERT INTO workloads VALUES
	('bytelm', 'Byte-level language model: a small GPT on the source of Python''s standard library.', '{"additionalProperties": false, "properties": {"max_bytes": {"default": 1000000, "description": "length of the corpus, from its start", "minimum": 1, "title": "Max Bytes", "type": "integer"}, "validation_share": {"default": 0.05, "description": "share of the corpus, from its end, held out", "exclusiveMaximum": 1, "minimum": 0, "title": "Validation Share", "type": "number"}, "block_size": {"default": 64, "description": "bytes of context", "maximum": 65536, "minimum": 1, "title": "Block Size", "type": "integer"}, "n_layer": {"default": 2, "description": "transformer blocks", "maximum": 1000, "minimum": 1, "title": "N Layer", "type": "integer"}, "n_head": {"default": 4, "description": "attention heads; divides d_model", "maximum": 1000, "minimum": 1, "title": "N Head", "type": "integer"}, "d_model": {"default": 64, "description": "width", "maximum": 65536, "minimum": 1, "title": "D Model", "type": "integer"}, "dropout": {"default": 0.0, "description": "share dropped in attention and after each sublayer", "exclusiveMaximum": 1, "minimum": 0, "title": "Dropout", "type": "number"}}, "title": "ByteLMConfig", "type": "object"}', '{"val_loss": "min"}', '2026-11-26 01:06:42.335401+00'),
	('digits', 'Handwritten digits: a small convolutional network on scikit-learn''s 8 × 8 images.', '{"additionalProperties": false, "properties": {"channels": {"default": 16, "description": "channels of the first convolution; the second has twice as many", "maximum": 1024, "minimum": 1, "title": "Channels", "type": "integer"}, "hidden": {"default": 64, "description": "width of the hidden layer", "maximum": 65536, "minimum": 1, "title": "Hidden", "type": "integer"}, "dropout": {"default": 0.1, "description": "share of hidden units dropped", "exclusiveMaximum": 1, "minimum": 0, "title": "Dropout", "type": "number"}}, "title": "DigitsConfig", "type": "object"}', '{"val_loss": "min", "val_accuracy": "max"}', '2026-11-26 01:06:42.335401+00');
