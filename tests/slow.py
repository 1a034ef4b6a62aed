"""Which tests `make test` leaves to `make test-all`, and why: (regex over `FILE::TEST`, reason), first match wins.

None: `make test` runs it, however long it takes. A rule that matches no test is an error of the collection.
"""

RULES = (
    # What happens to processes and to the files that serve alone
    (r'test_resume::.*', 'kills processes'),
    (r'test_checkpoint::test_a_killed_process.*', 'kills processes'),
    (r'test_chat::test_a_process_survives.*', 'kills processes'),
    (r'test_export::test_the_(folder_serves|loader_(reads_instructions|writes|finds)).*', 'subprocess export'),
    (r'test_grounding::test_an_exported_run.*', 'subprocess export'),
    (r'test_notebook::test_(it_shows|every_stage|pictures_find).*', 'notebook'),
    (r'test_mutants::test_a_mutant_is_noticed.*', 'mutant'),
    (r'test_additions::test_an_addition_touches.*', 'training in a process'),
    # Recorded cases: float64, and the same computation at other sizes
    (r'test_verify::test_the_stored_noise.*', 'float64 compiles a second program'),
    (r'test_verify::.*\[(low_variance_.*|small_stage1|stage1_clip|stage1_world2|optim)\]', 'other recorded size'),
    (r'test_huggingface_compare::test_every_layer_agrees\[opt alone\]', None),
    (r'test_huggingface_compare::test_every_layer_agrees.*', 'other family of the same comparison'),
    (r'test_precision::test_nothing_rounds.*\[opt\]', None),
    (r'test_precision::test_nothing_rounds.*', 'other family of the same comparison'),
    # One network stands for its variants, OPT for the language models
    (r'test_every_variant::test_a_step_on_eight.*\[(qformer|mlp)\]', None),
    (r'test_every_variant::test_a_step_on_eight.*', 'other variant on eight devices'),
    (r'test_devices::test_eight_devices.*\[(stage1|stage2)\]', 'other stage on eight devices'),
    (r'test_training::test_a_second_training.*\[stage2\]', None),
    (r'test_training::test_a_second_training.*', 'other stage of the same property'),
    (r'test_nested::test_masked_queries.*\[generation-opt\]', None),
    (r'test_nested::test_masked_queries.*', 'other family of the same property'),
    (r'test_nested::test_each_step.*', 'training'),
    (r'test_parity_stage1::test_keys_of_wrong_pictures.*', 'two ways to the same gradients'),
    (
        r'test_(gated_cross_attention|stream|rows|rank|quantize|chat|lm_families)::.*\[(llama|t5|lm2|lm3|5\.0).*\]',
        'other family',
    ),
    (r'test_target_losses::.*\[untied.*\]', 'other family'),
    # Runs that are trained for one file of tests
    (r'test_digits::test_the_line.*', 'training'),
    (r'test_study::test_a_step_takes_time.*', 'training'),
    (r'test_encode::test_training_from_features.*\[stage1\]', 'training'),
    (r'test_grounding::test_(a_run|the_command|what_lacks).*', 'training'),
    (
        r'test_lora::test_(it_learns|gradients_exist|a_run|a_merged|other_frame|a_quantized|a_further|beside).*',
        'training',
    ),
    (r'test_video::test_(a_video_answers|encoded_videos).*', 'training'),
    (r'test_gated_cross_attention::test_everything_that_writes.*', 'training'),
    (r'test_connectors::test_a_connector_learns.*', 'training'),
    (r'test_t5_training::test_stage2_trains.*', 'training'),
    (r'test_taps::test_a_run_reads.*', 'training'),
    (r'test_mixture::test_a_run_over_two.*', 'training'),
    (r'.*', None),
)
